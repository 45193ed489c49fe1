"""Which pieces of the data a model is calibrated on."""

from __future__ import annotations

import torch
from torch import Tensor


def pick(pieces: Tensor, count: int, seed: int) -> Tensor:
    """`count` pieces drawn without replacement, or all of them if there are fewer; in their order.

    Args:
        pieces: (pieces, ...).
        count: at least 1.
        seed: chooses them.
    """
    if count >= len(pieces):
        return pieces
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pieces), generator=generator)[:count]
    return pieces[chosen.sort().values]
