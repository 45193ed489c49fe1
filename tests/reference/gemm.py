"""What gemm, gemm_dequantize and gemm_requantize compute. Sums of int8 products are exact in
float64; scales and rounding are in float32, one operation after the other, in the order that
defines bit equality."""

import torch

from .quantize import quantize


def gemm(a, weight):
    return (a.double() @ weight.double().T).to(torch.int32)


def value(a, weight, a_scale, b_scale, acc_offset=None, bias=None, residual=None):
    """float32 (M, N), before the cast or the rounding to int8."""
    acc = gemm(a, weight)
    if acc_offset is not None:
        acc = acc - acc_offset
    result = acc.float() * (a_scale[:, None] * b_scale)
    if bias is not None:
        result = result + bias
    if residual is not None:
        result = result + residual.float()
    return result


def gemm_dequantize(
    a, weight, a_scale, b_scale, acc_offset=None, bias=None, residual=None, dtype=torch.float32
):
    return value(a, weight, a_scale, b_scale, acc_offset, bias, residual).to(dtype)


def gemm_requantize(
    a, weight, a_scale, b_scale, out_scale, acc_offset=None, bias=None, out_zero_point=None
):
    result = value(a, weight, a_scale, b_scale, acc_offset, bias)
    return quantize(result, out_scale, out_zero_point, axis=1)
