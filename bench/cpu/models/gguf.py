"""Language models as GGUF files, which llama.cpp reads. Needs the packages gguf and, to quantize, llama_cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.shapes import LanguageShape

CONTEXT = 1 << 20  # a Mamba has no limit; llama.cpp wants a number
NORM_EPS = 1e-5
KINDS = ("F16", "Q8_0", "Q4_0")


def tensors(state: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """A language model's tensors under llama.cpp's names, in its layouts and precisions.

    Matrices are float16; what llama.cpp wants in float32 (norms, convolution, A, D, biases) is float32. There is no
    output.weight: without it llama.cpp multiplies by the embedding table, as a model with tied ends does.

    Args:
        state: of transformers.MambaForCausalLM, its head tied to its embedding.
        layers: how many blocks.

    Yields:
        Name and tensor.
    """
    yield "token_embd.weight", state["backbone.embeddings.weight"].half()
    yield "output_norm.weight", state["backbone.norm_f.weight"].float()
    for index in range(layers):
        layer, block = f"backbone.layers.{index}.", f"blk.{index}."
        mixer = f"{layer}mixer."
        yield f"{block}attn_norm.weight", state[f"{layer}norm.weight"].float()
        for name in ("in", "x", "dt", "out"):
            yield f"{block}ssm_{name}.weight", state[f"{mixer}{name}_proj.weight"].half()
        yield f"{block}ssm_dt.bias", state[f"{mixer}dt_proj.bias"].float()
        yield f"{block}ssm_conv1d.weight", state[f"{mixer}conv1d.weight"].float().squeeze(1)
        yield f"{block}ssm_conv1d.bias", state[f"{mixer}conv1d.bias"].float()
        yield f"{block}ssm_a", -torch.exp(state[f"{mixer}A_log"].float())
        yield f"{block}ssm_d", state[f"{mixer}D"].float()


def write_f16(state: Mapping[str, Tensor], shape: LanguageShape, path: Path) -> None:
    """Writes a model with an empty vocabulary: it takes and gives token ids.

    Raises:
        ImportError: gguf is not installed.
    """
    import gguf

    layer = shape.layer
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(layer.hidden)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(shape.layers)
    writer.add_vocab_size(shape.vocab)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_ssm_conv_kernel(layer.width)
    writer.add_ssm_inner_size(layer.dim)
    writer.add_ssm_state_size(layer.dstate)
    writer.add_ssm_time_step_rank(layer.dt_rank)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, tensor in tensors(state, shape.layers):
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(f16: Path, kind: str, path: Path) -> None:
    """Quantizes with llama.cpp itself, by its own choice of a type for each tensor.

    Args:
        f16: from write_f16.
        kind: "Q8_0" or "Q4_0".
        path: to write.

    Raises:
        ImportError: llama_cpp is not installed.
        OSError: llama.cpp refuses.
    """
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(
        str(f16).encode(), str(path).encode(), ctypes.byref(options)
    )
    if code != 0:
        raise OSError(f"{path}: llama.cpp could not quantize {f16} to {kind}: code {code}")
