"""Language models with random weights in the formats of every engine, kept on disk between runs.

    python -m bench.language_models mamba-130m FOLDER F16 Q8_0

makes what is missing. A process of its own, because the float model and what quantizing it takes are gone when it ends.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import gguf_files
from bench.shapes import LANGUAGE_MODELS, LanguageShape
from bench.token_ids import token_ids
from mambaquant_ext import quantize_, recipe, save
from mambaquant_ext.artifacts.files import FORMAT_VERSION
from mambaquant_ext.model.checkpoint import load_float_model, skeleton
from mambaquant_ext.model.hf import import_transformers
from mambaquant_ext.transform.rotate import SAMPLES_PER_CHANNEL

SEED = 0
BLOCKS = "backbone.layers."
FLOAT, W8A8, REFERENCE = "float", "w8a8", "logits.npy"
# So many blocks differ, and stand one after another until there are as many as the model has. Quantizing those alone
# takes seconds where all would take minutes, and ten times the float model's memory. No engine knows that they repeat.
DISTINCT = 4
MAKING_BYTES_PER_PARAMETER = 12  # while the float model is written
CHECKED = (2, 32)  # batch, tokens
WINDOW = 128  # tokens that are calibrated on at once
# transformers' own initial weights make a model that doubles any rounding in each layer, so that no two engines
# agree on its logits. These, like trained weights, do not: the table outweighs what the layers add to it.
WEIGHT_STD, EMBEDDING_STD = 0.02, 0.3


def random_model(shape: LanguageShape) -> Any:
    """A transformers.MambaForCausalLM in float32 with random weights, the same ones at every call."""
    transformers = import_transformers()
    layer = shape.layer
    torch.manual_seed(SEED)
    config = transformers.MambaConfig(
        vocab_size=shape.vocab,
        hidden_size=layer.hidden,
        num_hidden_layers=shape.layers,
        state_size=layer.dstate,
        time_step_rank=layer.dt_rank,
        conv_kernel=layer.width,
        initializer_range=WEIGHT_STD,
        layer_norm_epsilon=gguf_files.NORM_EPS,
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(EMBEDDING_STD / WEIGHT_STD)
    return model


def deepened(model: Any, layers: int) -> Any:
    """A model of so many layers, which are the given model's over and over, each with weights of its own in memory."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    deep = skeleton(config)
    few, state = len(model.backbone.layers), model.state_dict()
    whole = {}
    for name in deep.state_dict():
        source = name
        if name.startswith(BLOCKS):
            index, _, rest = name.removeprefix(BLOCKS).partition(".")
            source = f"{BLOCKS}{int(index) % few}.{rest}"
        whole[name] = state[source].clone()
    deep.load_state_dict(whole, assign=True)
    deep.tie_weights()
    return deep.eval()


def prompts(shape: LanguageShape, batch: int, tokens: int) -> torch.Tensor:
    """(batch, tokens) int64 ids."""
    return torch.from_numpy(token_ids(shape.vocab, batch, tokens))


def calibration(shape: LanguageShape) -> torch.Tensor:
    """Prompts, as few as the recipe's KLT rotations take, of dt and, over all layers, of the residual stream."""
    rows = max(shape.layer.dt_rank, -(-shape.layer.hidden // shape.layers))
    return prompts(shape, -(-SAMPLES_PER_CHANNEL * rows // WINDOW), WINDOW)


def folder_of(shape: LanguageShape, root: Path) -> Path:
    """Where a model's files are; another layout of checkpoints gets another folder."""
    return root / f"{shape.name}-{FORMAT_VERSION}"


def formats(folder: Path, shape: LanguageShape) -> dict[str, Callable[[Path], None]]:
    """Every file or folder of a model: its name, and what writes it to a path."""

    shallow = replace(shape, layers=min(DISTINCT, shape.layers))

    def write_float(path: Path) -> None:
        deepened(random_model(shallow), shape.layers).save_pretrained(path)

    def write_reference(path: Path) -> None:
        ids = prompts(shape, *CHECKED)
        with torch.no_grad():
            logits = load_float_model(folder / FLOAT)(ids, logits_to_keep=1).logits[:, -1]
        with path.open("wb") as file:
            np.save(file, logits.double().numpy())

    def write_w8a8(path: Path) -> None:
        model = random_model(shallow)
        config = {**model.config.to_dict(), "num_hidden_layers": shape.layers}
        batches = list(calibration(shallow).split(1))
        packed = quantize_(model, batches, recipe("w8a8"), seed=SEED)
        blocks = tuple(packed.blocks[i % len(packed.blocks)] for i in range(shape.layers))
        names = tuple(packed.names[0].replace("0", str(i)) for i in range(shape.layers))
        save(replace(packed, blocks=blocks, names=names), config, path)

    def write_f16(path: Path) -> None:
        gguf_files.write_f16(load_float_model(folder / FLOAT).state_dict(), shape, path)

    def write_quantized(kind: str) -> Callable[[Path], None]:
        return lambda path: gguf_files.quantize(folder / "F16.gguf", kind, path)

    return {
        FLOAT: write_float,
        REFERENCE: write_reference,
        W8A8: write_w8a8,
        "F16.gguf": write_f16,
        **{f"{kind}.gguf": write_quantized(kind) for kind in ("Q8_0", "Q4_0")},
    }


def missing(folder: Path, wanted: Iterable[str]) -> list[str]:
    """The wanted files that are not there, and what they are made from."""
    absent = {name for name in wanted if not (folder / name).exists()}
    if absent & {"Q8_0.gguf", "Q4_0.gguf"}:
        absent.add("F16.gguf")
    return sorted(absent | {FLOAT}) if absent else []


def make(folder: Path, shape: LanguageShape, wanted: Sequence[str]) -> None:
    """Writes the wanted files that are not there, each under another name first: a half-written one is never used."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in formats(folder, shape).items():
        path, unfinished = folder / name, folder / f"unfinished-{os.getpid()}-{name}"
        if name in wanted and not path.exists():
            try:
                write(unfinished)
                unfinished.rename(path)
            finally:
                if unfinished.is_dir():
                    shutil.rmtree(unfinished)
                unfinished.unlink(missing_ok=True)


def weight_bytes(folder: Path) -> int:
    """What a token must read of the quantized model: every tensor but the embedding table, of which it reads a row."""
    from safetensors import safe_open

    total = 0
    with safe_open(folder / W8A8 / "model.safetensors", "pt") as file:
        names = file.keys()
        for name in names:
            if "embedding" not in name:
                tensor = file.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    return total


if __name__ == "__main__":
    name, target, *kinds = sys.argv[1:]
    make(Path(target), LANGUAGE_MODELS[name], kinds)
