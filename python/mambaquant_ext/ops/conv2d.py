"""Depthwise convolution of an image over int8 with SiLU (the conv of a vision Mamba block)."""

from __future__ import annotations

import torch
from torch import Tensor


def depthwise_conv2d_quantize(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None = None,
    *,
    stride: int = 1,
) -> Tensor:
    """Convolves each channel over the image, adds the bias, applies SiLU and quantizes.

    acc[i, j, c] = sum_(m, n) weight[m, n, c] * x[stride * i + m - kernel_height // 2,
    stride * j + n - kernel_width // 2, c] is an exact integer, with 0 outside the image;
    v = acc * (x_scale * weight_scale) + bias in float32, product and sum rounded separately;
    q = clamp(rne(SiLU(v) * (1 / out_scale)) + out_zero_point, qmin, 127), qmin = -127 without an
    out_zero_point and -128 with one. From v on this is causal_conv1d_quantize.

    Args:
        x: (batch, height, width, dim), int8, symmetric; the last dimension is contiguous, the
            others may have any stride (a column slice of a wider buffer is fine).
        x_scale: (dim,), float32, in units of x.
        weight: (kernel_height, kernel_width, dim), int8 in [-127, 127]; sizes odd, from 1 to 7.
        weight_scale: (dim,), float32.
        bias: (dim,), float32, or None.
        out_scale: (dim,), float32, in units of SiLU(v).
        out_zero_point: (dim,), int32, or None for symmetric quantization.
        stride: 1 or 2, in both directions.

    Returns:
        q: (batch, out_height, out_width, dim), int8, contiguous; each out size is
            (size - 1) // stride + 1.

    Raises:
        ValueError: a shape or layout that does not fit.
        TypeError: a dtype other than those above.
        NotImplementedError: a kernel size or a stride other than those above.
    """
    return torch.ops.mambaquant.depthwise_conv2d_quantize(
        x, x_scale, weight, weight_scale, bias, out_scale, out_zero_point, stride
    )


@torch.library.register_fake("mambaquant::depthwise_conv2d_quantize")
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None,
    stride: int,
) -> Tensor:
    batch, height, width, dim = x.shape
    return x.new_empty(
        (batch, (height + stride - 1) // stride, (width + stride - 1) // stride, dim)
    )
