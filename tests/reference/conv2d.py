"""What depthwise_conv2d_quantize computes: an exact integer convolution of the image with zeros around it, tap by tap,
and the epilogue of causal_conv1d_quantize."""

import torch
from torch.nn import functional as F

from .conv1d import epilogue


def depthwise_conv2d_quantize(
    x, x_scale, weight, weight_scale, bias, out_scale, out_zero_point=None, stride=1
):
    """q, (batch, out_height, out_width, dim)."""
    batch, height, width, dim = x.shape
    kernel_height, kernel_width, _ = weight.shape
    rows, columns = kernel_height // 2, kernel_width // 2
    padded = F.pad(x.long(), (0, 0, columns, columns, rows, rows))
    acc = torch.zeros(batch, height, width, dim, dtype=torch.int64)
    for m in range(kernel_height):
        for n in range(kernel_width):
            acc += weight[m, n].long() * padded[:, m : m + height, n : n + width]
    acc = acc[:, ::stride, ::stride]
    return epilogue(acc, x_scale, weight_scale, bias, out_scale, out_zero_point)
