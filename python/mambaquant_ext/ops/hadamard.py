"""The orthonormal Hadamard transform along the last dimension, alone and with int8 output.

A size n = p * 2^k is supported for p = 1, and for p = 3, 5, ... 15 with k >= 2, up to 32768. It
defines the matrix H = (H_m (x) H_{n/m}) / sqrt(n), index i * (n/m) + j, with m = 1 for p = 1 and
m = 4p otherwise. H_{n/m} is Sylvester's matrix in natural order; H_m is Paley's, as constructed in
scripts/gen_hadamard.py, and not symmetric for every m.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

from mambaquant_ext import _load


def hadamard_transform(x: Tensor, inverse: bool = False) -> Tensor:
    """Rotates every row: y = x H, or x H^T with inverse.

    Computed in float32; the sums are scaled by 1 / sqrt(n) at the end, so n * max|x| must be a
    finite float32.

    Args:
        x: (tokens, n), float16/bfloat16/float32; the last dimension is contiguous.
        inverse: apply H^T.

    Returns:
        y: (tokens, n), x's dtype.

    Raises:
        ValueError: a shape or layout that does not fit, or an unsupported n (the message names
            the nearest).
        TypeError: a dtype other than those above.

    Source: MambaQuant, section 4 (rotation); QuaRot, appendix A (sizes m * 2^k).
    """
    return torch.ops.mambaquant.hadamard_transform(x, inverse)


def hadamard_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotates every row and quantizes it: q = clamp(rne(x H / scale), -127, 127).

    1 / sqrt(n) and 1 / scale are one float32 factor on the unnormalised sums.

    Args:
        x: (tokens, n), float16/bfloat16/float32; the last dimension is contiguous.
        scale: (1,), float32, in units of x H: static, per tensor; or None: dynamic, per token.

    Returns:
        q: (tokens, n), int8 in [-127, 127].
        scale: (tokens,), float32, max(max|x H|, 1e-12) / 127, when dynamic; (0,) when static.

    Raises:
        ValueError: a shape or layout that does not fit, or an unsupported n (the message names
            the nearest).
        TypeError: a dtype other than those above.

    Source: MambaQuant, section 4 (online rotation before the output projection).
    """
    return torch.ops.mambaquant.hadamard_quantize(x, scale)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The dense matrix H of the transform, for folding rotations into weights.

    x @ hadamard_matrix(n) is hadamard_transform(x).

    Args:
        n: a supported size.
        dtype: of the result; fold in float64 and round once.

    Returns:
        H: (n, n), orthonormal.

    Raises:
        ValueError: an unsupported n (the message names the nearest).
    """
    base = torch.tensor(_load.hadamard_base(n), dtype=torch.float64)
    matrix = base.reshape(isqrt(base.numel()), -1)
    butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(matrix, butterfly)
    return (matrix / n**0.5).to(dtype)


@lru_cache(maxsize=1)
def supported_hadamard_sizes() -> tuple[int, ...]:
    """Every size that the transform supports, rising."""
    return _load.supported_hadamard_sizes()


def is_supported(n: int) -> bool:
    """Whether the transform of size n exists."""
    return n in supported_hadamard_sizes()


@torch.library.register_fake("mambaquant::hadamard_transform")
def _(x: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("mambaquant::hadamard_quantize")
def _(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    scale_out = x.new_empty([x.shape[0] if scale is None else 0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale_out
