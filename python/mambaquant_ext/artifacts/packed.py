"""A quantized model as plain tensors: what packing makes, files hold, and the runtime reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mambaquant_ext.artifacts.layout import BlockLayout
from mambaquant_ext.config import Recipe

# Names of matrices outside the blocks, in a checkpoint.
HEAD_WEIGHT, LINEAR_WEIGHT = "head.lm_head", "linear.weight"


def block_prefix(index: int) -> str:
    """What the names of a block's tensors begin with, in a checkpoint.

    Args:
        index: of the block.
    """
    return f"layers.{index}."


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelWeight:
    """A matrix as the kernels of one instruction set read it.

    Attributes:
        packed: as pack_gemm_weight gives it, opaque.
        layout: what pack_gemm_weight names it.
        acc_offset: (N,), int32, sum_k zero_point[k] * weight[n, k], or None where the input has no zero points.
    """

    packed: Tensor
    layout: int
    acc_offset: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmSource:
    """What a KernelWeight is made from.

    Attributes:
        name: of the weight in the checkpoint.
        weight: (N, K), int8.
        zero_point: (K,), int32, of its input, or None.
    """

    name: str
    weight: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedConv:
    """A depthwise convolution.

    Attributes:
        weight: (width, dim) or (kernel_height, kernel_width, dim), int8, tap-major, oldest input first.
        weight_scale: (dim,), float32.
        bias: (dim,), float32.
        x_scale: (dim,), float32, of its int8 output; folded into x_proj's columns.
        x_zero_point: (dim,), int32.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    x_scale: Tensor
    x_zero_point: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBranch:
    """A selective state space.

    Attributes:
        x_proj: (dt_rank + 2 dstate, dim), int8; dt rows, B rows, C rows. Its columns carry the scales of x.
        x_proj_scale: (dt_rank + 2 dstate,), float32.
        x_proj_bias: (dt_rank + 2 dstate,), float32.
        dtBC_scale: (dt_rank + 2 dstate,), float32, of x_proj's int8 output; one value for dt, one for C.
        dt_proj: (dim, dt_rank), int8.
        dt_proj_scale: (dim,), float32.
        dt_bias: (dim,), float32.
        A: (dstate, dim), float32.
        D: (dim,), float32.
        readout_scale: (dim,), float32, of the int8 state at the read-out; ones where the read-out is float.
    """

    x_proj: Tensor
    x_proj_scale: Tensor
    x_proj_bias: Tensor
    dtBC_scale: Tensor
    dt_proj: Tensor
    dt_proj_scale: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    readout_scale: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBlock:
    """One quantized block: int8 weights as plain (N, K) matrices, float32 scales, constants.

    Attributes:
        layout: sizes and structure.
        norm_weight: (hidden,), float32, or None without a norm.
        norm_bias: (hidden,), float32, or None without a norm.
        in_scale: (1,), float32, of in_proj's input.
        in_proj: (2 dim, hidden), int8; conv input rows, then gate rows, if there is a gate.
        in_proj_scale: (2 dim,), float32.
        in_proj_bias: (2 dim,), float32.
        xz_scale: (2 dim,), float32, of in_proj's int8 output.
        convs: used by the branches.
        branches: used by the routes.
        merge_gate: (routes, routes, dim), float32, or None.
        out_norm_weight: (dim,), float32, or None.
        out_norm_bias: (dim,), float32, or None.
        squeeze: (excite_dim, dim), float32, or None.
        excite: (dim, excite_dim), float32, or None.
        gate_scale: (dim,), float32, s of S-SiLU.
        skip_weight: (hidden,) or (hidden, hidden), float32, or None.
        skip_bias: (hidden,), float32, or None.
        out_proj: (hidden, dim), int8.
        out_proj_scale: (hidden,), float32.
        out_proj_bias: (hidden,), float32.
        out_scale: (1,), float32, of out_proj's input.
        class_out_scale: (1,), float32, of the class token's, or None.
    """

    layout: BlockLayout
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    in_scale: Tensor
    in_proj: Tensor
    in_proj_scale: Tensor
    in_proj_bias: Tensor
    xz_scale: Tensor
    convs: tuple[PackedConv, ...]
    branches: tuple[PackedBranch, ...]
    merge_gate: Tensor | None = None
    out_norm_weight: Tensor | None = None
    out_norm_bias: Tensor | None = None
    squeeze: Tensor | None = None
    excite: Tensor | None = None
    gate_scale: Tensor
    skip_weight: Tensor | None = None
    skip_bias: Tensor | None = None
    out_proj: Tensor
    out_proj_scale: Tensor
    out_proj_bias: Tensor
    out_scale: Tensor
    class_out_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Flat name to tensor, "branches.0.A" for one of a branch; absent ones left out."""
        found: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            if isinstance(value, tuple):
                for index, part in enumerate(value):
                    found |= {
                        f"{field.name}.{index}.{f.name}": getattr(part, f.name)
                        for f in dataclasses.fields(part)
                    }
        return found

    def x_zero_point_of(self, branch: int) -> Tensor | None:
        """The zero points of what a branch scans.

        Args:
            branch: its index.

        Returns:
            (branch's dim,), int32, contiguous, or None where x is symmetric.
        """
        layout = self.layout.branches[branch]
        if layout.conv is None:
            return None
        zero_point = self.convs[layout.conv].x_zero_point
        return zero_point[layout.first_channel :][: layout.dim].contiguous()

    def gemm_sources(self) -> Iterator[GemmSource]:
        """Every matrix that an int8 product reads, in the order of their use."""
        yield GemmSource(name="in_proj", weight=self.in_proj)
        for index, branch in enumerate(self.branches):
            yield GemmSource(
                name=f"branches.{index}.x_proj",
                weight=branch.x_proj,
                zero_point=self.x_zero_point_of(index),
            )
            yield GemmSource(name=f"branches.{index}.dt_proj", weight=branch.dt_proj)
        yield GemmSource(name="out_proj", weight=self.out_proj)

    @classmethod
    def from_tensors(cls, layout: BlockLayout, tensors: Mapping[str, Tensor]) -> PackedBlock:
        """The inverse of tensors().

        Args:
            layout: of the block.
            tensors: by flat name, exactly those of layout.expected().
        """

        def parts(kind: type, name: str, count: int) -> tuple[Any, ...]:
            return tuple(
                kind(**{f.name: tensors[f"{name}.{i}.{f.name}"] for f in dataclasses.fields(kind)})
                for i in range(count)
            )

        return cls(
            layout=layout,
            convs=parts(PackedConv, "convs", len(layout.convs)),
            branches=parts(PackedBranch, "branches", len(layout.branches)),
            **{name: tensor for name, tensor in tensors.items() if "." not in name},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedHead:
    """Embedding and head of a language model. An int8 matrix comes with one scale a row, a float one with none.

    Attributes:
        embedding: (vocab, hidden), int8 or float16.
        embedding_scale: (vocab,), float32, or None.
        norm_f: (hidden,), float32.
        lm_head: (vocab, hidden), int8 or float32.
        lm_head_scale: (vocab,), float32, or None.
        head_scale: (1,), float32, of the int8 head's input, or None.
    """

    embedding: Tensor
    embedding_scale: Tensor | None
    norm_f: Tensor
    lm_head: Tensor
    lm_head_scale: Tensor | None
    head_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor, without the absent ones."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """An int8 linear layer outside the blocks.

    Attributes:
        weight: (N, K), int8.
        weight_scale: (N,), float32.
        bias: (N,), float32.
        in_scale: (1,), float32, of its input.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    in_scale: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedModel:
    """A quantized model, ready to save or to run.

    A language model has a `head`. Any other model keeps what surrounds its blocks as it is, rotated where the stream
    is: `surroundings`, and maybe one int8 linear layer.

    Attributes:
        adapter: name of the adapter that knows the model.
        names: of the modules that the blocks replace, first to last.
        blocks: one a name.
        head: embedding, final norm and lm_head of a language model, or None.
        surroundings: float tensors outside the blocks, by their names in the model; empty for a language model.
        linear_name: of the layer that `linear` replaces, or None.
        linear: an int8 head, or None.
        recipe: that made it.
        provenance: what it was calibrated on: data hash, counts, seed.
        kernel_weights: by the names of gemm_sources(), from a packed image for the instruction set in use; those
            that are missing are packed when the model is built.
    """

    adapter: str
    names: tuple[str, ...]
    blocks: tuple[PackedBlock, ...]
    head: PackedHead | None = None
    surroundings: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    linear_name: str | None = None
    linear: PackedLinear | None = None
    recipe: Recipe
    provenance: Mapping[str, Any]
    kernel_weights: Mapping[str, KernelWeight] = dataclasses.field(default_factory=dict)

    def gemm_sources(self) -> Iterator[GemmSource]:
        """Every matrix that an int8 product reads, in the order of their use."""
        for index, block in enumerate(self.blocks):
            for source in block.gemm_sources():
                yield dataclasses.replace(source, name=f"{block_prefix(index)}{source.name}")
        if self.head is not None and self.head.lm_head_scale is not None:
            yield GemmSource(name=HEAD_WEIGHT, weight=self.head.lm_head)
        if self.linear is not None:
            yield GemmSource(name=LINEAR_WEIGHT, weight=self.linear.weight)

    def kernel_weights_of(self, block: int) -> dict[str, KernelWeight]:
        """Those of one block, by the names of its own gemm_sources().

        Args:
            block: its index.
        """
        names = [source.name for source in self.blocks[block].gemm_sources()]
        found = {name: self.kernel_weights.get(block_prefix(block) + name) for name in names}
        return {name: weight for name, weight in found.items() if weight is not None}
