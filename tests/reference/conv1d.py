"""What causal_conv1d_quantize computes: an exact integer convolution, SiLU in float64, and float32
scales in the order that defines bit equality."""

import torch

from .quantize import quantize


def epilogue(acc, x_scale, weight_scale, bias, out_scale, out_zero_point):
    """q of integer sums: scale, bias, SiLU and rounding of every convolution."""
    v = acc.float() * (x_scale * weight_scale)
    if bias is not None:
        v = v + bias
    y = (v.double() * torch.sigmoid(v.double())).float()
    return quantize(y, out_scale, out_zero_point, axis=1)


def causal_conv1d_quantize(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    out_scale,
    out_zero_point=None,
    initial_state=None,
    reverse=False,
    order=None,
):
    """q and final_state."""
    batch, seqlen, dim = x.shape
    width = weight.shape[0]
    steps = torch.arange(seqlen) if order is None else order.long()
    steps = steps.flip(0) if reverse else steps
    walk = x[:, steps]
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, dim)
    history = torch.cat([initial_state, walk], 1)
    acc = torch.zeros(batch, seqlen, dim, dtype=torch.int64)
    for j in range(width):
        acc += weight[j].long() * history[:, j : j + seqlen].long()
    q = torch.empty_like(walk)
    q[:, steps] = epilogue(acc, x_scale, weight_scale, bias, out_scale, out_zero_point)
    return q, history[:, seqlen:]
