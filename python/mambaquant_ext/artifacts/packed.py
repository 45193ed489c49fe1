"""A quantized model as plain tensors: what packing makes, files hold, and the runtime reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext.config import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBlock:
    """One quantized block: int8 weights as plain (N, K) matrices, float32 scales, constants.

    Attributes:
        norm_weight: (hidden,), float32.
        in_scale: (1,), float32, of the normalised input.
        in_proj: (2 dim, hidden), int8; conv input rows, then gate rows.
        in_proj_scale: (2 dim,), float32.
        in_proj_bias: (2 dim,), float32.
        xz_scale: (2 dim,), float32, of in_proj's int8 output.
        conv: (width, dim), int8, tap-major, oldest input first.
        conv_scale: (dim,), float32.
        conv_bias: (dim,), float32.
        x_scale: (dim,), float32, of the conv's int8 output; folded into x_proj's columns.
        x_zero_point: (dim,), int32.
        x_proj: (dt_rank + 2 dstate, dim), int8; dt rows, B rows, C rows.
        x_proj_scale: (dt_rank + 2 dstate,), float32.
        x_proj_bias: (dt_rank + 2 dstate,), float32.
        dtBC_scale: (dt_rank + 2 dstate,), float32, of x_proj's int8 output; one value for dt, one for C.
        dt_proj: (dim, dt_rank), int8.
        dt_proj_scale: (dim,), float32.
        dt_bias: (dim,), float32.
        A: (dstate, dim), float32.
        D: (dim,), float32.
        gate_scale: (dim,), float32, s of S-SiLU.
        readout_scale: (dim,), float32, of the int8 state at the read-out; ones where the read-out is float.
        out_proj: (hidden, dim), int8.
        out_proj_scale: (hidden,), float32.
        out_proj_bias: (hidden,), float32.
        out_scale: (1,), float32, of out_proj's input.
    """

    norm_weight: Tensor
    in_scale: Tensor
    in_proj: Tensor
    in_proj_scale: Tensor
    in_proj_bias: Tensor
    xz_scale: Tensor
    conv: Tensor
    conv_scale: Tensor
    conv_bias: Tensor
    x_scale: Tensor
    x_zero_point: Tensor
    x_proj: Tensor
    x_proj_scale: Tensor
    x_proj_bias: Tensor
    dtBC_scale: Tensor
    dt_proj: Tensor
    dt_proj_scale: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    gate_scale: Tensor
    readout_scale: Tensor
    out_proj: Tensor
    out_proj_scale: Tensor
    out_proj_bias: Tensor
    out_scale: Tensor

    @property
    def sizes(self) -> BlockSizes:
        """The sizes that the tensors imply."""
        hidden, dim = self.out_proj.shape
        return BlockSizes(
            hidden=hidden,
            dim=dim,
            dstate=self.A.shape[0],
            dt_rank=self.dt_proj.shape[1],
            width=self.conv.shape[0],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor, in field order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """Sizes of a Mamba-1 block."""

    hidden: int
    dim: int
    dstate: int
    dt_rank: int
    width: int

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of a PackedBlock of these sizes."""
        hidden, dim, dstate = self.hidden, self.dim, self.dstate
        rows = self.dt_rank + 2 * dstate
        int8 = {
            "in_proj": (2 * dim, hidden),
            "conv": (self.width, dim),
            "x_proj": (rows, dim),
            "dt_proj": (dim, self.dt_rank),
            "out_proj": (hidden, dim),
        }
        float32 = {
            "norm_weight": (hidden,),
            "in_scale": (1,),
            "in_proj_scale": (2 * dim,),
            "in_proj_bias": (2 * dim,),
            "xz_scale": (2 * dim,),
            "conv_scale": (dim,),
            "conv_bias": (dim,),
            "x_scale": (dim,),
            "x_proj_scale": (rows,),
            "x_proj_bias": (rows,),
            "dtBC_scale": (rows,),
            "dt_proj_scale": (dim,),
            "dt_bias": (dim,),
            "A": (dstate, dim),
            "D": (dim,),
            "gate_scale": (dim,),
            "readout_scale": (dim,),
            "out_proj_scale": (hidden,),
            "out_proj_bias": (hidden,),
            "out_scale": (1,),
        }
        return {
            **{name: (shape, torch.int8) for name, shape in int8.items()},
            **{name: (shape, torch.float32) for name, shape in float32.items()},
            "x_zero_point": ((dim,), torch.int32),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """What a block's tensors do not tell: how they are to be used.

    Attributes:
        norm_eps: of the block's RMSNorm.
        has_out_rotation: R2 is in out_proj.
        has_state_rotation: R4 is in x_proj's C rows.
        quantize_readout: level L2 rather than L1.
        weight_bits: of every weight matrix.
        activation_bits: of every activation but the gate.
        gate_bits: of the gate.
    """

    norm_eps: float
    has_out_rotation: bool
    has_state_rotation: bool
    quantize_readout: bool
    weight_bits: int = 8
    activation_bits: int = 8
    gate_bits: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedHead:
    """Embedding and head. An int8 matrix comes with one scale a row, a float one with none.

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
class PackedModel:
    """A quantized language model, ready to save or to run.

    Attributes:
        blocks: first to last.
        options: shared by the blocks.
        head: embedding, final norm and lm_head.
        recipe: that made it.
        provenance: what it was calibrated on: data hash, counts, seed.
    """

    blocks: tuple[PackedBlock, ...]
    options: BlockOptions
    head: PackedHead
    recipe: Recipe
    provenance: Mapping[str, Any]
