"""int8 matrix product with fused scaling (algorithm: integer linear layer, W8A8)."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext._load import gemm_packing

CUDA_LAYOUT = 16  # kCudaGemmLayout (mambaquant/gemm.h); below are those of the instruction sets


def pack_gemm_weight(weight: Tensor) -> tuple[Tensor, int]:
    """Lays a weight out as the kernels of the instruction set in use read it. Done once, at load.

    Args:
        weight: (N, K), int8 in [-127, 127]; the last dimension is contiguous. K at most 131072.

    Returns:
        packed: (N * K with both rounded up,), int8, opaque.
        layout: names the packing; the gemm operators take it with `packed` and refuse one that they
            cannot read, such as that of another instruction set.

    Raises:
        ValueError: a shape or layout that does not fit, or a weight of -128.
        TypeError: weight is not int8.
        NotImplementedError: K is too large for exact int32 sums.
    """
    return torch.ops.mambaquant.pack_gemm_weight(weight)


def gemm(a: Tensor, packed: Tensor, layout: int, n: int) -> Tensor:
    """Exact int32 product: acc[m, n] = sum_k a[m, k] * weight[n, k].

    Args:
        a: (M, K), int8, all of [-128, 127]; the last dimension is contiguous. K at most 131072.
        packed: from pack_gemm_weight on the (N, K) weight.
        layout: from pack_gemm_weight.
        n: N.

    Returns:
        acc: (M, N), int32.

    Raises:
        ValueError: a shape or layout that does not fit, or `packed` made from another shape.
        TypeError: a dtype other than those above.
        NotImplementedError: packed for another instruction set, or K too large.
    """
    return torch.ops.mambaquant.gemm(a, packed, layout, n)


def gemm_dequantize(
    a: Tensor,
    packed: Tensor,
    layout: int,
    a_scale: Tensor,
    b_scale: Tensor,
    acc_offset: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A linear layer from int8 to float.

    value[m, n] = float(acc[m, n] - acc_offset[n]) * (a_scale[m] * b_scale[n]) + bias[n]
        + residual[m, n]
    with acc as in gemm; in float32, in this order, each operation rounded on its own (no fma), then
    cast to dtype.

    Args:
        a: (M, K), int8; the last dimension is contiguous. K at most 131072, with acc_offset 65536.
        packed: from pack_gemm_weight on the (N, K) weight.
        layout: from pack_gemm_weight.
        a_scale: float32, (1,) for one static scale or (M,) for one per token.
        b_scale: (N,), float32, the scale of each weight row.
        acc_offset: (N,), int32, the zero-point correction sum_k zero_point[k] * weight[n, k], or
            None.
        bias: (N,), float32, or None.
        residual: (M, N), float16/bfloat16/float32, or None; the last dimension is contiguous.
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        value: (M, N), dtype.

    Raises:
        ValueError: a shape or layout that does not fit, or `packed` made from another shape.
        TypeError: a dtype other than those above.
        NotImplementedError: packed for another instruction set, or K too large.

    Source:
        MambaQuant, the quantized linear layers; zero-point identity of uniform quantization.
    """
    return torch.ops.mambaquant.gemm_dequantize(
        a, packed, layout, a_scale, b_scale, acc_offset, bias, residual, dtype
    )


def gemm_requantize(
    a: Tensor,
    packed: Tensor,
    layout: int,
    a_scale: Tensor,
    b_scale: Tensor,
    out_scale: Tensor,
    acc_offset: Tensor | None = None,
    bias: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """A linear layer from int8 to int8 with a scale for each output channel.

    q[m, n] = clamp(rne(value[m, n] * (1 / out_scale[n])) + out_zero_point[n], qmin, 127)
    with value as in gemm_dequantize without residual; qmin is -127 without an out_zero_point and
    -128 with one.

    Args:
        a: (M, K), int8; the last dimension is contiguous. K at most 131072, with acc_offset 65536.
        packed: from pack_gemm_weight on the (N, K) weight.
        layout: from pack_gemm_weight.
        a_scale: float32, (1,) for one static scale or (M,) for one per token.
        b_scale: (N,), float32, the scale of each weight row.
        out_scale: (N,), float32, the scale of each output channel.
        acc_offset: (N,), int32, the zero-point correction sum_k zero_point[k] * weight[n, k], or
            None.
        bias: (N,), float32, or None.
        out_zero_point: (N,), int32, or None for symmetric outputs.

    Returns:
        q: (M, N), int8.

    Raises:
        ValueError: a shape or layout that does not fit, or `packed` made from another shape.
        TypeError: a dtype other than those above.
        NotImplementedError: packed for another instruction set, or K too large.

    Source:
        MambaQuant, the quantized linear layers; zero-point identity of uniform quantization.
    """
    return torch.ops.mambaquant.gemm_requantize(
        a, packed, layout, a_scale, b_scale, acc_offset, bias, out_scale, out_zero_point
    )


@torch.library.register_fake("mambaquant::pack_gemm_weight")
def _(weight: Tensor) -> tuple[Tensor, int]:
    n, k = weight.shape
    packed = weight.new_empty([(n + 31) // 32 * 32 * ((k + 15) // 16 * 16)])
    is_cuda = weight.device.type == "cuda"
    return packed, CUDA_LAYOUT if is_cuda else gemm_packing().layout


@torch.library.register_fake("mambaquant::gemm")
def _(a: Tensor, packed: Tensor, layout: int, n: int) -> Tensor:
    return a.new_empty([a.shape[0], n], dtype=torch.int32)


@torch.library.register_fake("mambaquant::gemm_dequantize")
def _(
    a: Tensor,
    packed: Tensor,
    layout: int,
    a_scale: Tensor,
    b_scale: Tensor,
    acc_offset: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty([a.shape[0], b_scale.shape[0]], dtype=dtype)


@torch.library.register_fake("mambaquant::gemm_requantize")
def _(
    a: Tensor,
    packed: Tensor,
    layout: int,
    a_scale: Tensor,
    b_scale: Tensor,
    acc_offset: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None,
) -> Tensor:
    return a.new_empty([a.shape[0], b_scale.shape[0]])
