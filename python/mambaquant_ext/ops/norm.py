"""Residual add, RMSNorm or LayerNorm, and int8 in one pass: the input of a block's first linear."""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of s = x (+ residual), quantized: y = s / sqrt(mean(s^2) + eps) * weight.

    q = clamp(rne(y / scale), -127, 127). All arithmetic is in float32. With a residual, s is
    x + residual rounded to the residual's dtype: the norm is taken of the values that a later
    reader of the stored residual sees.

    Args:
        x: (tokens, dim), float16/bfloat16/float32; the last dimension is contiguous.
        weight: (dim,), float32, or None for 1 (folded into the next linear layer).
        residual: (tokens, dim), float16/bfloat16/float32 (not necessarily x's dtype), or None.
        scale: (1,), float32, in units of y: static, per tensor; or None: dynamic, per token.
        eps: added to the mean square, at least 0.

    Returns:
        q: (tokens, dim), int8 in [-127, 127]. NaN gives 127.
        scale: (tokens,), float32, max(max|y|, 1e-12) / 127, when dynamic; (0,) when static.
        residual: (tokens, dim), s in the residual's dtype, a new tensor; without a residual (0,),
            x's dtype.

    Raises:
        ValueError: a shape, layout or eps that does not fit.
        TypeError: a dtype other than those above.

    Source: RMSNorm, Zhang and Sennrich 2019, eq. 4; symmetric uniform quantizer.
    """
    return torch.ops.mambaquant.rmsnorm_quantize(x, weight, residual, scale, eps)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (+ residual), quantized: y = (s - mean) / sqrt(var + eps) * weight + bias.

    As rmsnorm_quantize, with the mean taken off; var is the mean of (s - mean)^2.

    Args:
        x: (tokens, dim), float16/bfloat16/float32; the last dimension is contiguous.
        weight: (dim,), float32, or None for 1.
        bias: (dim,), float32, or None for 0.
        residual: (tokens, dim), float16/bfloat16/float32 (not necessarily x's dtype), or None.
        scale: (1,), float32, in units of y: static, per tensor; or None: dynamic, per token.
        eps: added to the variance, at least 0.

    Returns:
        q: (tokens, dim), int8 in [-127, 127]. NaN gives 127.
        scale: (tokens,), float32, when dynamic; (0,) when static.
        residual: (tokens, dim), s in the residual's dtype, a new tensor; without a residual (0,),
            x's dtype.

    Raises:
        ValueError: a shape, layout or eps that does not fit.
        TypeError: a dtype other than those above.

    Source: LayerNorm, Ba et al. 2016, eq. 4; symmetric uniform quantizer.
    """
    return torch.ops.mambaquant.layernorm_quantize(x, weight, bias, residual, scale, eps)


def _empty_outputs(
    x: Tensor, residual: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale_out = x.new_empty([x.shape[0] if scale is None else 0], dtype=torch.float32)
    residual_out = x.new_empty([0]) if residual is None else residual.new_empty(x.shape)
    return q, scale_out, residual_out


@torch.library.register_fake("mambaquant::rmsnorm_quantize")
def _(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, residual, scale)


@torch.library.register_fake("mambaquant::layernorm_quantize")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, residual, scale)
