"""The emulated mode: the float forward pass with every tensor rounded to the packed model's grids.

It shares no code with the kernels, and it is the only mode for fewer than 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.artifacts import PackedBlock, PackedBranch, PackedConv
from mambaquant_ext.artifacts.layout import BranchLayout, ConvLayout
from mambaquant_ext.model import BranchWeights, ConvWeights, MixerWeights
from mambaquant_ext.model.forward import Tap
from mambaquant_ext.run.reading import norm_before, norm_behind, x_scale_of


def round_symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest value of the grid scale * [-qmax, qmax].

    Args:
        x: (..., groups).
        scale: (groups,) or (1,), float32.
        bits: 2 to 8.

    Returns:
        As x.
    """
    limit = 2 ** (bits - 1) - 1
    inv_scale = (1.0 / scale).to(x.dtype)
    return torch.round(x * inv_scale).clamp(-limit, limit) * scale.to(x.dtype)


def round_asymmetric(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The nearest value of the grid scale * ([-2^(bits-1), 2^(bits-1) - 1] - zero_point).

    Args:
        x: (..., groups).
        scale: (groups,), float32.
        zero_point: (groups,), int32.
        bits: 2 to 8.

    Returns:
        As x.
    """
    half = 2 ** (bits - 1)
    inv_scale = (1.0 / scale).to(x.dtype)
    q = (torch.round(x * inv_scale) + zero_point).clamp(-half, half - 1)
    return (q - zero_point) * scale.to(x.dtype)


def dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, ...) int8 rows times their scales (N,)."""
    return q.to(dtype) * scale.to(dtype).view(-1, *[1] * (q.dim() - 1))


def emulated_weights(block: PackedBlock, dtype: torch.dtype) -> MixerWeights:
    """The float weights that the int8 codes stand for.

    Args:
        block: packed.
        dtype: to compute in; float64 makes every integer product exact.
    """
    layout = block.layout
    in_proj = dequantized(block.in_proj, block.in_proj_scale, dtype)
    split = [layout.dim] * 2 if layout.has_gate else [layout.dim]
    rows, biases = in_proj.split(split), block.in_proj_bias.split(split)
    convs = zip(block.convs, layout.convs, strict=True)
    branches = zip(block.branches, layout.branches, strict=True)
    return MixerWeights(
        norm=norm_before(block),
        in_x=rows[0],
        in_x_bias=biases[0],
        in_z=rows[1] if layout.has_gate else None,
        in_z_bias=biases[1] if layout.has_gate else None,
        convs=tuple(_conv(conv, structure, dtype) for conv, structure in convs),
        branches=tuple(
            _branch(branch, structure, x_scale_of(block, structure), dtype)
            for branch, structure in branches
        ),
        routes=layout.routes,
        merge=layout.merge,
        merge_gate=block.merge_gate,
        merge_threshold=layout.merge_threshold,
        out_norm=norm_behind(block),
        squeeze=block.squeeze,
        excite=block.excite,
        gate_scale=block.gate_scale,
        out=dequantized(block.out_proj, block.out_proj_scale, dtype),
        out_bias=block.out_proj_bias,
        skip=layout.skip,
        skip_weight=block.skip_weight,
        skip_bias=block.skip_bias,
        class_token=layout.class_token,
        has_in_rotation=layout.has_in_rotation,
        has_out_rotation=layout.has_out_rotation,
        has_state_rotation=layout.has_state_rotation,
    ).to(dtype)


def _conv(conv: PackedConv, layout: ConvLayout, dtype: torch.dtype) -> ConvWeights:
    return ConvWeights(
        weight=dequantized(conv.weight.movedim(-1, 0), conv.weight_scale, dtype),
        bias=conv.bias,
        stride=layout.stride,
        along_route=layout.along_route,
    )


def _branch(
    branch: PackedBranch, layout: BranchLayout, x_scale: Tensor, dtype: torch.dtype
) -> BranchWeights:
    # The packed columns carry the scale of x; the emulated x is in its own units.
    x_proj = dequantized(branch.x_proj, branch.x_proj_scale, dtype) / x_scale.to(dtype)
    x_dt, x_B, x_C = x_proj.split([layout.dt_rank, layout.dstate, layout.dstate])
    return BranchWeights(
        x_dt=x_dt,
        x_dt_bias=branch.x_proj_bias[: layout.dt_rank],
        x_B=x_B,
        x_C=x_C,
        dt=dequantized(branch.dt_proj, branch.dt_proj_scale, dtype),
        dt_bias=branch.dt_bias,
        A=branch.A.T,
        D=branch.D,
        conv=layout.conv,
        first_channel=layout.first_channel,
    )


def rounding_tap(block: PackedBlock) -> Tap:
    """The tap that rounds each site to its packed scale.

    Args:
        block: packed.
    """
    layout = block.layout
    bits = layout.activation_bits
    symmetric = {
        "in": block.in_scale,
        "xs": block.xz_scale[: layout.dim],
        "z": block.xz_scale[layout.dim :],
        "out": block.out_scale,
    }
    if block.class_out_scale is not None:
        symmetric["out.class"] = block.class_out_scale
    readout: dict[str, Tensor] = {}
    for index, (branch, structure) in enumerate(zip(block.branches, layout.branches, strict=True)):
        parts = branch.dtBC_scale.split([structure.dt_rank, structure.dstate, structure.dstate])
        for name, scale in zip(("dt", "B", "C"), parts, strict=True):
            symmetric[f"{name}.{index}"] = scale
        readout[f"h.{index}"] = branch.readout_scale[:, None]
    convs = {f"x.{index}": conv for index, conv in enumerate(block.convs)}

    def tap(site: str, value: Tensor) -> Tensor:
        if site in convs:
            return round_asymmetric(value, convs[site].x_scale, convs[site].x_zero_point, bits)
        if site in readout:
            return round_symmetric(value, readout[site], bits) if layout.quantize_readout else value
        return round_symmetric(value, symmetric[site], layout.gate_bits if site == "z" else bits)

    return tap
