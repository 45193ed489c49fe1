"""Rounding of weights and the choice of scales."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.artifacts import Range

# A dead channel still needs a scale whose reciprocal is finite. Far below any scale of a live one: x_proj's rows carry
# x's scales, so that theirs are products of two small numbers.
SMALLEST_SCALE = 1e-20


def qmax(bits: int) -> int:
    """Largest magnitude of a symmetric grid: 127 for 8 bits."""
    return int(2 ** (bits - 1) - 1)


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale per output channel (algorithm section 6.2: weights are never asymmetric).

    Args:
        weight: (N, K), float.
        bits: 2 to 8.

    Returns:
        q: (N, K), int8, in [-qmax, qmax].
        scale: (N,), float32.

    Raises:
        ValueError: a weight that is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("quantize_weight: expected finite weights, got inf or NaN")
    amax = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale = (amax.float() / qmax(bits)).clamp_min(SMALLEST_SCALE)
    q = torch.round(weight.float() * (1.0 / scale)[:, None]).clamp(-qmax(bits), qmax(bits))
    return q.to(torch.int8), scale


def symmetric_scale(activation: Range, bits: int, groups: int) -> Tensor:
    """Scale of a symmetric activation.

    Args:
        activation: (1,) or (groups,).
        bits: 2 to 8.
        groups: scales wanted; one range is repeated.

    Returns:
        (groups,), float32.
    """
    scale = (activation.amax / qmax(bits)).clamp_min(SMALLEST_SCALE)
    return scale.expand(groups).contiguous()


def asymmetric_scale(activation: Range, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an asymmetric activation on [-2^(bits-1), 2^(bits-1) - 1].

    Args:
        activation: (1,) or (groups,); includes zero.
        bits: 2 to 8.
        groups: scales wanted; one range is repeated.

    Returns:
        scale: (groups,), float32.
        zero_point: (groups,), int32.
    """
    scale = ((activation.high - activation.low) / (2**bits - 1)).clamp_min(SMALLEST_SCALE)
    zero_point = torch.round(-activation.low / scale) - 2 ** (bits - 1)
    return scale.expand(groups).contiguous(), zero_point.to(torch.int32).expand(groups).contiguous()
