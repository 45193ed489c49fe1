"""Builders of difficult inputs that several case tables share."""

import torch

FLOAT_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Around each vector width (8 lanes, 16 lanes) and a real layer.
DIMS = [1, 7, 8, 9, 15, 16, 17, 31, 33, 97, 384, 768]


def normal(shape, generator, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


def with_outlier_channels(shape, generator, dtype=torch.float32, factor=100.0):
    """Normal, with every eleventh channel `factor` times larger, as Mamba's activations are."""
    x = torch.randn(shape, generator=generator)
    x[..., ::11] *= factor
    return x.to(dtype)


def int8(shape, generator):
    """Uniform over the symmetric range."""
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def offset_view(x):
    """The same values as a view with a offset and padded rows; last dimension contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    wide = torch.full((rows.shape[0] + 1, rows.shape[1] + 3), 99, dtype=x.dtype)
    view = wide[1:, 2 : 2 + rows.shape[1]]
    view.copy_(rows)
    return view if x.dim() == 2 else view.unflatten(0, x.shape[:-1])


def positive(shape, generator, low=0.01, high=0.1):
    """Uniform in [low, high), float32: scales."""
    return torch.rand(shape, generator=generator) * (high - low) + low
