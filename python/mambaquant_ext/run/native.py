"""Blocks that take tokens one after another, run by one native call instead of one operator after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambaquant_ext.artifacts import NormKind, Skip
from mambaquant_ext.ops.gemm import CUDA_LAYOUT
from mambaquant_ext.run.ends import BlockEntry
from mambaquant_ext.run.modules import FinalNorm, GemmWeight, QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from mambaquant_ext.run.mixers import IntegerMixer


def fits(entry: BlockEntry) -> bool:
    """Whether the native call knows blocks of this structure: those of a language model.

    RMSNorm without a bias, one causal convolution, one forward route, a gate, a residual skip.

    Args:
        entry: of the block, which knows whether one kernel is all that stands before in_proj.
    """
    layout = entry.layout
    return (
        entry.is_fused
        and layout.norm is NormKind.RMS
        and layout.has_gate
        and layout.is_sequential
        and layout.skip is Skip.RESIDUAL
        and layout.out_norm is None
        and layout.excite_dim is None
    )


class NativeBlocks:
    """Some blocks of one layout, maybe between an embedding and a head.

    The native object is made at the first call, and anew by each copy: it points into the packed tensors.
    """

    def __init__(
        self,
        mixers: Sequence[IntegerMixer],
        embedding: QuantEmbedding | None = None,
        norm: FinalNorm | None = None,
        head: QuantLinear | None = None,
    ) -> None:
        """Takes the parts.

        Args:
            mixers: of blocks that fit, of one layout.
            embedding: of a whole language model, or None.
            norm: before the head, or None.
            head: with an int8 weight, or None.
        """
        self.mixers, self.embedding, self.norm, self.head = mixers, embedding, norm, head
        self._native: Any = None

    def can_run(self, source: Tensor) -> bool:
        """Whether the native call may take a tensor now: on the CPU's kernels, not empty, and seen by nobody else.

        Args:
            source: the input.
        """
        is_packed_for_cpu = self.mixers[0].in_proj.layout != CUDA_LAYOUT
        return source.is_cpu and is_packed_for_cpu and source.numel() > 0 and _is_plain(source)

    def __getstate__(self) -> dict[str, Any]:
        """All but the native object."""
        return {**self.__dict__, "_native": None}

    def forward(
        self,
        source: Tensor,
        conv: Tensor,
        ssm: Tensor,
        stream: Tensor | None = None,
        last: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Advances the states and fills what is given of the outputs.

        Args:
            source: ids (batch, seqlen), int64, or the residual stream (batch, seqlen, hidden), float32.
            conv: (blocks, batch, width - 1, dim), int8.
            ssm: (blocks, batch, dstate, dim), float32.
            stream: (batch, seqlen, hidden), float32: behind the blocks.
            last: (batch, hidden), float32: the stream at the last tokens.
            logits: (batch, vocab), float32: of the last tokens.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: other dtypes.
            IndexError: an id outside the vocabulary.
            NotImplementedError: another instruction set than the weights were packed for.
        """
        if self._native is None:
            self._native = self._made()
        ids, x = (source, None) if source.dtype == torch.int64 else (None, source)
        self._native.forward(ids, x, conv, ssm, stream, last, logits)

    def _made(self) -> Any:
        mixer = self.mixers[0]
        layout, branch = mixer.layout, mixer.layout.branches[0]
        sizes = {
            "hidden": layout.hidden,
            "dim": layout.dim,
            "dstate": branch.dstate,
            "dt_rank": branch.dt_rank,
            "width": layout.convs[0].kernel[0],
            "blocks": len(self.mixers),
        }
        if self.embedding is not None:
            sizes["vocab"] = self.embedding.weight.shape[0]
        return torch.classes.mambaquant.LanguageModel(
            sizes,
            mixer.in_proj.layout,
            layout.norm_eps,
            layout.has_out_rotation,
            layout.has_state_rotation,
            {name: tensor for name, tensor in self.tensors().items() if tensor is not None},
        )

    def tensors(self) -> dict[str, Tensor | None]:
        """All that the native call reads, by the names of csrc/include/mambaquant/language_model.h."""
        found: dict[str, Tensor | None] = {}
        if self.embedding is not None:
            found |= {"embedding": self.embedding.weight, "embedding_scale": self.embedding.scale}
        if self.norm is not None and self.head is not None and self.head.packed is not None:
            found |= {
                "head.norm_weight": self.norm.weight.data,
                "head.in_scale": self.head.in_scale,
            }
            found |= _weight("head", self.head.packed)
        for index, mixer in enumerate(self.mixers):
            found |= {f"blocks.{index}.{name}": t for name, t in _block_tensors(mixer).items()}
        return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether a call may read the tensor's memory: nothing records, batches or imitates operators.

    What does would miss the native call, which is no operator, and take its result for a constant.
    """
    is_watched = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
    return type(tensor) in (Tensor, torch.nn.Parameter) and not is_watched


def _weight(name: str, weight: GemmWeight) -> dict[str, Tensor | None]:
    return {
        f"{name}.packed": weight.packed,
        f"{name}.scale": weight.scale,
        f"{name}.acc_offset": weight.acc_offset,
        f"{name}.bias": weight.bias,
    }


def _block_tensors(mixer: IntegerMixer) -> dict[str, Tensor | None]:
    packed, branch, runtime = mixer.packed, mixer.packed.branches[0], mixer.branches[0]
    conv = packed.convs[0]
    return {
        "norm_weight": mixer.entry.weight,
        "in_scale": packed.in_scale,
        **_weight("in_proj", mixer.in_proj),
        "xz_scale": packed.xz_scale,
        "conv_weight": conv.weight,
        "conv_weight_scale": conv.weight_scale,
        "conv_bias": conv.bias,
        "x_scale": conv.x_scale,
        "x_zero_point": conv.x_zero_point,
        **_weight("x_proj", runtime.x_proj),
        "dtBC_scale": branch.dtBC_scale,
        **_weight("dt_proj", runtime.dt_proj),
        "dt_bias": branch.dt_bias,
        "A": branch.A,
        "D": branch.D,
        "readout_scale": branch.readout_scale if packed.layout.quantize_readout else None,
        "gate_scale": packed.gate_scale,
        "out_scale": packed.out_scale,
        **_weight("out_proj", mixer.exit.out_proj),
    }
