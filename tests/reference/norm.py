"""What the norm ops compute: the norm in float64, scales and rounding in float32."""

import torch

from .quantize import quantize, scale_from_amax


def add_residual(x, residual):
    """The sum, rounded to the residual's dtype; x itself without a residual."""
    return x if residual is None else (x.float() + residual.float()).to(residual.dtype)


def normalize(s, weight=None, bias=None, eps=1e-5, subtract_mean=False):
    s = s.double()
    if subtract_mean:
        s = s - s.mean(dim=1, keepdim=True)
    y = s / torch.sqrt((s * s).mean(dim=1, keepdim=True) + eps)
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def norm_quantize(
    x, weight=None, bias=None, residual=None, scale=None, eps=1e-5, subtract_mean=False
):
    """q, scale (empty when given), s (empty without a residual)."""
    s = add_residual(x, residual)
    y = normalize(s, weight, bias, eps, subtract_mean).float()
    s_out = x.new_empty(0) if residual is None else s
    if scale is not None:
        return quantize(y, scale), torch.empty(0), s_out
    amax = y.abs().amax(dim=1) if y.shape[1] else torch.zeros(y.shape[0])
    dynamic = scale_from_amax(amax)
    return quantize(y, dynamic, None, 0), dynamic, s_out
