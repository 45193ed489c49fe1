"""Depthwise causal convolution over int8 with SiLU (algorithm: mixer steps 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_quantize(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolves each channel causally over time, adds the bias, applies SiLU and quantizes.

    acc[t, c] = sum_j weight[j, c] * x[t - width + 1 + j, c] is an exact integer;
    v = acc * (x_scale * weight_scale) + bias in float32, product and sum rounded separately;
    q = clamp(rne(SiLU(v) * (1 / out_scale)) + out_zero_point, qmin, 127), qmin = -127 without an
    out_zero_point and -128 with one. A sequence that is split anywhere, its state handed on, gives
    the bits of the whole.

    With reverse the sequence is walked from its last token to its first: tap width - 1 still meets
    the current token and tap 0 the one width - 1 tokens later in time. q keeps the order of x.
    States are in the order of the walk, oldest first: row 0 of final_state is token width - 2, its
    last row token 0.

    With an order, step t of the walk meets token order[t], or order[seqlen - 1 - t] with reverse as
    well: the taps meet the tokens of the width - 1 steps before, wherever those lie. q keeps the
    order of x all the same, and states are again in that of the walk.

    Args:
        x: (batch, seqlen, dim), int8, symmetric; the last dimension is contiguous, the others may
            have any stride (a column slice of a wider buffer is fine).
        x_scale: (dim,), float32, in units of x.
        weight: (width, dim), int8 in [-127, 127], oldest tap first; width 2, 3 or 4.
        weight_scale: (dim,), float32.
        bias: (dim,), float32, or None.
        out_scale: (dim,), float32, in units of SiLU(v).
        out_zero_point: (dim,), int32, or None for symmetric quantization.
        initial_state: (batch, width - 1, dim), int8: the tokens before x, oldest first; None for
            zeros.
        reverse: walk from the last token, or the last of order, to the first.
        order: (seqlen,), int32, a permutation of 0 ... seqlen - 1, or None for that of x. Its
            values are checked on the CPU. On CUDA, where a check would wait for the GPU, tokens
            outside the sequence are neither read (they count as 0) nor written, and q is undefined
            at those that order leaves out.

    Returns:
        q: (batch, seqlen, dim), int8, contiguous.
        final_state: (batch, width - 1, dim), int8: the last width - 1 tokens of the walk, oldest
            first, with rows of initial_state (or zeros) in front where seqlen < width - 1.

    Raises:
        ValueError: a shape or layout that does not fit; an order that is no permutation.
        TypeError: a dtype other than those above.
        NotImplementedError: a width other than 2, 3, 4.
    """
    return torch.ops.mambaquant.causal_conv1d_quantize(
        x,
        x_scale,
        weight,
        weight_scale,
        bias,
        out_scale,
        out_zero_point,
        initial_state,
        reverse,
        order,
    )


def causal_conv1d_update_quantize(
    x: Tensor,
    conv_state: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """One token of causal_conv1d_quantize per sequence; equal bits.

    Args:
        x: (batch, dim), int8; the last dimension is contiguous.
        conv_state: (batch, width - 1, dim), int8, oldest first. Changed in place: the rows move up
            by one and x becomes the last.
        x_scale: (dim,), float32.
        weight: (width, dim), int8, oldest tap first; width 2, 3 or 4.
        weight_scale: (dim,), float32.
        bias: (dim,), float32, or None.
        out_scale: (dim,), float32.
        out_zero_point: (dim,), int32, or None for symmetric quantization.

    Returns:
        q: (batch, dim), int8.

    Raises:
        ValueError: a shape or layout that does not fit.
        TypeError: a dtype other than those above.
        NotImplementedError: a width other than 2, 3, 4.
    """
    return torch.ops.mambaquant.causal_conv1d_update_quantize(
        x, conv_state, x_scale, weight, weight_scale, bias, out_scale, out_zero_point
    )


@torch.library.register_fake("mambaquant::causal_conv1d_quantize")
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, _, dim = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, weight.shape[0] - 1, dim))


@torch.library.register_fake("mambaquant::causal_conv1d_update_quantize")
def _(
    x: Tensor,
    conv_state: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape)
