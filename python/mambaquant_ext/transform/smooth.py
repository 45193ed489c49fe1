"""Smoothing: moves spread between channels from activations into weights, or centres it away.

Every function returns a block with the same output; scales are (channels,) and divide the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.model import MixerWeights

# Smoothing scales outside this range would multiply the weights of dead channels by more than 100.
SMALLEST_SCALE, LARGEST_SCALE = 1e-2, 1e2


def smoothing_scale(activation_amax: Tensor, weight_amax: Tensor) -> Tensor:
    """s = sqrt(amax_j / wmax_j), clamped to [0.01, 100] (SmoothQuant with alpha = 0.5; algorithm section 2.2).

    Args:
        activation_amax: (channels,), max |activation| over calibration tokens.
        weight_amax: (channels,), max |weight| over output channels, or the other operand's maximum.

    Returns:
        (channels,), in the dtype of weight_amax.
    """
    tiny = 1e-5
    ratio = activation_amax.to(weight_amax.dtype).clamp_min(0) / weight_amax.clamp_min(tiny)
    return ratio.sqrt().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def smooth_in(layer: MixerWeights, scale: Tensor) -> MixerWeights:
    """S1, SmoothQuant between the norm and in_proj: gamma / s, in_proj diag(s) (algorithm section 2.2.6).

    Args:
        layer: the block.
        scale: (hidden,).
    """
    return layer.replace(
        norm_weight=layer.norm_weight / scale, in_x=layer.in_x * scale, in_z=layer.in_z * scale
    )


def smooth_gate(layer: MixerWeights, scale: Tensor) -> MixerWeights:
    """S2: out_proj's input is divided by s through the gate, whose activation becomes S-SiLU.

    z' = z / s and z' sigmoid(s z') = SiLU(z) / s, so in_z rows are divided and out columns multiplied by s
    (algorithm section 2.2.1, paper's smooth-fused rotation).

    Args:
        layer: the block, before rotate_out.
        scale: (dim,).

    Raises:
        ValueError: out_proj's input is rotated already.
    """
    if layer.has_out_rotation:
        raise ValueError("smooth_gate: expected a block whose out_proj is not rotated yet")
    return layer.replace(
        in_z=layer.in_z / scale[:, None],
        in_z_bias=layer.in_z_bias / scale,
        gate_scale=layer.gate_scale * scale,
        out=layer.out * scale,
    )


def smooth_state(layer: MixerWeights, scale: Tensor) -> MixerWeights:
    """S4: B / s and C * s along the state axis; the state is h / s from then on.

    A state carried in from the original model must be divided by s once; nothing else changes, because the
    recurrence is linear and diagonal (algorithm section 2.2.2).

    Args:
        layer: the block, before rotate_state.
        scale: (dstate,).

    Raises:
        ValueError: the state axis is rotated already.
    """
    if layer.has_state_rotation:
        raise ValueError("smooth_state: expected a block whose state axis is not rotated yet")
    return layer.replace(x_B=layer.x_B / scale[:, None], x_C=layer.x_C * scale[:, None])


def smooth_dt(layer: MixerWeights, scale: Tensor) -> MixerWeights:
    """S5: dt / s between x_proj and dt_proj (algorithm section 2.2.4).

    Args:
        layer: the block.
        scale: (dt_rank,).
    """
    return layer.replace(
        x_dt=layer.x_dt / scale[:, None], x_dt_bias=layer.x_dt_bias / scale, dt=layer.dt * scale
    )


def center_dt(layer: MixerWeights, center: Tensor) -> MixerWeights:
    """Subtracts a constant from dt and adds its image to dt_bias (algorithm section 2.2.7).

    Args:
        layer: the block.
        center: (dt_rank,), mid-range of dt on calibration data.
    """
    center = center.to(layer.dt.dtype)
    return layer.replace(
        x_dt_bias=layer.x_dt_bias - center, dt_bias=layer.dt_bias + torch.mv(layer.dt, center)
    )
