"""R1 at the ends of a residual stream: what writes it before the first block, what reads it behind the last.

All functions change modules in place, in the dtype that they have (float64), with the row-vector convention: the stream
becomes x R. Source: algorithm sections 2.3.2 and 2.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rotation_behind(norm: nn.Module, rotation: Tensor) -> Tensor:
    """R, or P R for a stream that LayerNorms read: their mean is taken out of everything that writes it.

    Args:
        norm: of the stream.
        rotation: (hidden, hidden).
    """
    return rotation - rotation.mean(0) if isinstance(norm, nn.LayerNorm) else rotation


def rotate_rows_(layer: nn.Linear | nn.Conv2d | nn.Conv3d, write: Tensor) -> None:
    """A layer that writes the stream.

    Args:
        layer: (..., hidden) out.
        write: (hidden, hidden), see rotation_behind.
    """
    with torch.no_grad():
        layer.weight.copy_(torch.tensordot(write, layer.weight, ([0], [0])))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias @ write)


def rotate_token_(token: Tensor, write: Tensor) -> None:
    """A parameter that is added to the stream, or is a token of it.

    Args:
        token: (..., hidden).
        write: (hidden, hidden), see rotation_behind.
    """
    with torch.no_grad():
        token.copy_(token @ write)


def rotate_head_(norm: nn.Module, head: nn.Linear, rotation: Tensor) -> None:
    """The linear layer behind the final norm: head <- head diag(gamma) R, its bias + head beta.

    Args:
        norm: RMSNorm or LayerNorm of the stream; folded_norm takes its place.
        head: (hidden) -> any, with a bias if the norm has one; changed in place.
        rotation: (hidden, hidden).

    Raises:
        ValueError: a norm with a bias before a head without one.
    """
    gamma, beta = norm.weight, getattr(norm, "bias", None)
    assert isinstance(gamma, Tensor)
    with torch.no_grad():
        if isinstance(beta, Tensor):
            if head.bias is None:
                raise ValueError("rotate_head_: expected a head with a bias behind a norm with one")
            head.bias.add_(head.weight @ beta)
        head.weight.copy_((head.weight * gamma) @ rotation)


def folded_norm(norm: nn.Module) -> nn.RMSNorm:
    """An RMSNorm whose weight is 1: what a folded norm is on a rotated stream, LayerNorm or not, as it is centred.

    Args:
        norm: of the stream.
    """
    weight, eps = norm.weight, norm.eps
    assert isinstance(weight, Tensor) and isinstance(eps, float)
    folded = nn.RMSNorm(len(weight), eps=eps, dtype=weight.dtype, device=weight.device)
    return folded.requires_grad_(False)
