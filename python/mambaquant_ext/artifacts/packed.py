"""A quantized model as plain tensors: what packing makes, files hold, and the runtime reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mambaquant_ext.artifacts.layout import BlockLayout
from mambaquant_ext.config import Recipe


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
