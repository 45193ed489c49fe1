"""What quantize, quantize_dynamic and dequantize compute. Scales and rounding are in float32, in
the order that defines bit equality: inv_scale = 1 / scale, q = rne(x * inv_scale)."""

import torch

QMAX = 127
TINY_AMAX = 1e-12


def shaped(parameter, axis):
    """A scale or zero point, ready to broadcast against (tokens, dim)."""
    if axis is None:
        return parameter.reshape(1, 1)
    return parameter.reshape(-1, 1) if axis == 0 else parameter.reshape(1, -1)


def quantize(x, scale, zero_point=None, axis=None):
    inv_scale = 1.0 / shaped(scale.float(), axis)
    rounded = torch.round(x.float() * inv_scale)
    rounded = torch.where(rounded.isnan(), torch.inf, rounded)
    if zero_point is None:
        return rounded.clamp(-QMAX, QMAX).to(torch.int8)
    return (rounded + shaped(zero_point, axis)).clamp(-QMAX - 1, QMAX).to(torch.int8)


def scale_from_amax(amax):
    tiny = torch.tensor(TINY_AMAX, dtype=torch.float32)
    return torch.maximum(amax.float(), tiny) / QMAX


def dynamic_scale(x, axis=None):
    magnitude = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
    if axis is None:
        amax = magnitude.amax().reshape(1) if x.numel() else torch.zeros(1)
    else:
        other = 1 - axis
        amax = magnitude.amax(dim=other) if x.shape[other] else torch.zeros(x.shape[axis])
    return scale_from_amax(amax)


def quantize_dynamic(x, axis=None):
    scale = dynamic_scale(x, axis)
    return quantize(x, scale, None, axis), scale


def dequantize(q, scale, zero_point=None, axis=None, dtype=torch.float32):
    centred = q.float() if zero_point is None else q.float() - shaped(zero_point, axis)
    return (centred * shaped(scale, axis)).to(dtype)
