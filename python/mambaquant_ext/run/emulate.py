"""The emulated mode: the float forward pass with every tensor rounded to the packed model's grids.

It shares no code with the kernels, and it is the only mode for fewer than 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.artifacts import BlockOptions, PackedBlock
from mambaquant_ext.model import MixerWeights
from mambaquant_ext.model.forward import Tap


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


def emulated_weights(block: PackedBlock, options: BlockOptions, dtype: torch.dtype) -> MixerWeights:
    """The float weights that the int8 codes stand for.

    Args:
        block: packed tensors.
        options: of the block.
        dtype: to compute in; float64 makes every integer product exact.
    """
    sizes = block.sizes

    def dequantized(q: Tensor, scale: Tensor) -> Tensor:
        return q.to(dtype) * scale.to(dtype)[:, None]

    in_x, in_z = dequantized(block.in_proj, block.in_proj_scale).split(sizes.dim)
    in_x_bias, in_z_bias = block.in_proj_bias.split(sizes.dim)
    # The packed columns carry the scale of x; the emulated x is in its own units.
    x_proj = dequantized(block.x_proj, block.x_proj_scale) / block.x_scale.to(dtype)
    x_dt, x_B, x_C = x_proj.split([sizes.dt_rank, sizes.dstate, sizes.dstate])
    return MixerWeights(
        norm_weight=block.norm_weight,
        norm_eps=options.norm_eps,
        in_x=in_x,
        in_z=in_z,
        in_x_bias=in_x_bias,
        in_z_bias=in_z_bias,
        conv=dequantized(block.conv.T, block.conv_scale),
        conv_bias=block.conv_bias,
        x_dt=x_dt,
        x_dt_bias=block.x_proj_bias[: sizes.dt_rank],
        x_B=x_B,
        x_C=x_C,
        dt=dequantized(block.dt_proj, block.dt_proj_scale),
        dt_bias=block.dt_bias,
        A=block.A.T,
        D=block.D,
        out=dequantized(block.out_proj, block.out_proj_scale),
        out_bias=block.out_proj_bias,
        gate_scale=block.gate_scale,
        has_out_rotation=options.has_out_rotation,
        has_state_rotation=options.has_state_rotation,
    ).to(dtype)


def rounding_tap(block: PackedBlock, options: BlockOptions) -> Tap:
    """The tap that rounds each site to its packed scale.

    Args:
        block: packed tensors.
        options: bits and whether the read-out is int8.
    """
    sizes = block.sizes
    xs_scale, z_scale = block.xz_scale.split(sizes.dim)
    dt_scale, B_scale, C_scale = block.dtBC_scale.split([sizes.dt_rank, sizes.dstate, sizes.dstate])
    symmetric = {
        "in": block.in_scale,
        "xs": xs_scale,
        "dt": dt_scale,
        "B": B_scale,
        "C": C_scale,
        "out": block.out_scale,
    }

    def tap(site: str, value: Tensor) -> Tensor:
        if site == "x":
            return round_asymmetric(
                value, block.x_scale, block.x_zero_point, options.activation_bits
            )
        if site == "z":
            return round_symmetric(value, z_scale, options.gate_bits)
        if site == "h":
            if not options.quantize_readout:
                return value
            return round_symmetric(value, block.readout_scale[:, None], options.activation_bits)
        return round_symmetric(value, symmetric[site], options.activation_bits)

    return tap
