"""Smoothing: moves spread between channels from activations into weights, or centres it away.

Every function returns a block, or a branch of one, with the same output; scales are (channels,) and divide the
activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.model import BranchWeights, MixerWeights

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

    A normalised skip, which carries what the norm gives, is multiplied by s.

    Args:
        layer: the block, not rotated in front of in_proj.
        scale: (hidden,).

    Raises:
        ValueError: a block without a norm, or with a rotated or dense one behind it.
    """
    if layer.norm is None or layer.has_in_rotation:
        raise ValueError("smooth_in: expected a block with a norm and no rotation behind it")
    skip = layer.skip_weight
    if skip is not None:
        skip = skip * (scale if skip.dim() == 1 else scale[:, None])
    return layer.replace(
        norm=layer.norm.replace(weight=layer.norm.weight / scale, bias=layer.norm.bias / scale),
        in_x=layer.in_x * scale,
        in_z=None if layer.in_z is None else layer.in_z * scale,
        skip_weight=skip,
    )


def can_smooth_gate(layer: MixerWeights) -> bool:
    """Whether out_proj's input is a product or a norm's output, into which a scale per channel can be folded."""
    return layer.in_z is not None or (layer.out_norm is not None and layer.excite is None)


def smooth_gate(layer: MixerWeights, scale: Tensor) -> MixerWeights:
    """S2: out_proj's input is divided by s through the gate, whose activation becomes S-SiLU.

    z' = z / s and z' sigmoid(s z') = SiLU(z) / s, so in_z rows are divided and out columns multiplied by s
    (algorithm section 2.2.1, paper's smooth-fused rotation). All routes share the gate, hence s. A block without a
    gate but with a norm behind its scans divides that norm's weight and bias.

    Args:
        layer: the block, before rotate_out.
        scale: (dim,).

    Raises:
        ValueError: out_proj's input is rotated already, or there is neither a gate nor a norm before it.
    """
    if layer.has_out_rotation:
        raise ValueError("smooth_gate: expected a block whose out_proj is not rotated yet")
    merge_gate = None if layer.merge_gate is None else layer.merge_gate * scale
    layer = layer.replace(out=layer.out * scale, merge_gate=merge_gate)
    if layer.in_z is not None and layer.in_z_bias is not None:
        return layer.replace(
            in_z=layer.in_z / scale[:, None],
            in_z_bias=layer.in_z_bias / scale,
            gate_scale=layer.gate_scale * scale,
        )
    if layer.out_norm is None or layer.excite is not None:
        raise ValueError("smooth_gate: expected a block with a gate or a norm before out_proj")
    norm = layer.out_norm
    return layer.replace(out_norm=norm.replace(weight=norm.weight / scale, bias=norm.bias / scale))


def smooth_state(branch: BranchWeights, scale: Tensor) -> BranchWeights:
    """S4: B / s and C * s along the state axis; the state is h / s from then on.

    A state carried in from the original model must be divided by s once; nothing else changes, because the
    recurrence is linear and diagonal (algorithm section 2.2.2).

    Args:
        branch: of a block, before rotate_state.
        scale: (dstate,).
    """
    return branch.replace(x_B=branch.x_B / scale[:, None], x_C=branch.x_C * scale[:, None])


def smooth_dt(branch: BranchWeights, scale: Tensor) -> BranchWeights:
    """S5: dt / s between x_proj and dt_proj (algorithm section 2.2.4).

    Args:
        branch: of a block.
        scale: (dt_rank,).
    """
    return branch.replace(
        x_dt=branch.x_dt / scale[:, None],
        x_dt_bias=branch.x_dt_bias / scale,
        dt=branch.dt * scale,
    )


def center_dt(branch: BranchWeights, center: Tensor) -> BranchWeights:
    """Subtracts a constant from dt and adds its image to dt_bias (algorithm section 2.2.7).

    Args:
        branch: of a block.
        center: (dt_rank,), mid-range of dt on calibration data.
    """
    center = center.to(branch.dt.dtype)
    return branch.replace(
        x_dt_bias=branch.x_dt_bias - center, dt_bias=branch.dt_bias + torch.mv(branch.dt, center)
    )
