"""float to int8 and back, per tensor, per token or per channel (the uniform quantizer of W8A8)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """Quantizes with given scales: q = clamp(rne(x / scale) + zero_point, qmin, 127).

    Computed in float32 as x * (1 / scale), ties to even. qmin is -127 without a zero_point and -128
    with one. NaN and +inf give 127.

    Args:
        x: (tokens, dim), float16/bfloat16/float32; the last dimension is contiguous.
        scale: (1,), (tokens,) or (dim,) by axis, float32, in units of x.
        zero_point: as scale, int32, or None for symmetric quantization.
        axis: None for one scale per tensor, 0 for one per token, 1 for one per channel.

    Returns:
        q: (tokens, dim), int8, contiguous.

    Raises:
        ValueError: a shape, layout or axis that does not fit.
        TypeError: a dtype other than those above.
    """
    return torch.ops.mambaquant.quantize(x, scale, zero_point, axis)


def quantize_dynamic(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes symmetrically with scales measured on x itself: scale = max(max|x|, 1e-12) / 127.

    Args:
        x: (tokens, dim), float16/bfloat16/float32; the last dimension is contiguous. NaN does
            not count towards max|x|.
        axis: None for one scale per tensor, 0 for one per token, 1 for one per channel.

    Returns:
        q: (tokens, dim), int8.
        scale: (1,), (tokens,) or (dim,), float32.

    Raises:
        ValueError: a shape, layout or axis that does not fit.
        TypeError: a dtype other than those above.
    """
    return torch.ops.mambaquant.quantize_dynamic(x, axis)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turns int8 back into floats: x = (q - zero_point) * scale.

    Args:
        q: (tokens, dim), int8; the last dimension is contiguous.
        scale: (1,), (tokens,) or (dim,) by axis, float32.
        zero_point: as scale, int32, or None.
        axis: None for one scale per tensor, 0 for one per token, 1 for one per channel.
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        x: (tokens, dim), dtype.

    Raises:
        ValueError: a shape, layout or axis that does not fit.
        TypeError: a dtype other than those above.
    """
    return torch.ops.mambaquant.dequantize(q, scale, zero_point, axis, dtype)


def _scale_like(x: Tensor, axis: int | None) -> Tensor:
    shape = [1] if axis is None else [x.shape[axis]]
    return x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("mambaquant::quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake("mambaquant::quantize_dynamic")
def _(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), _scale_like(x, axis)


@torch.library.register_fake("mambaquant::dequantize")
def _(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, dtype: torch.dtype
) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)
