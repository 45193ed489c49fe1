"""Calibration statistics: what the observing passes hand to transforms and packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchMoments:
    """Statistics of one branch of a block, over all routes that use it.

    Attributes:
        dt_min: (dt_rank,), smallest dt.
        dt_max: (dt_rank,), largest dt.
        dt_mean: (dt_rank,), mean dt.
        dt_moment: (dt_rank, dt_rank), E[dt^T dt].
        h_amax: (dstate,), max |state| per state index.
        C_amax: (dstate,), max |C| per state index.
        samples: tokens behind dt_mean and dt_moment.
    """

    dt_min: Tensor
    dt_max: Tensor
    dt_mean: Tensor
    dt_moment: Tensor
    h_amax: Tensor
    C_amax: Tensor
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoments:
    """Statistics of one block that its transforms are made from.

    Attributes:
        in_amax: (hidden,), max |normalised input|.
        out_amax: (dim,), max |input of out_proj|.
        branches: of its branches.
    """

    in_amax: Tensor
    out_amax: Tensor
    branches: tuple[BranchMoments, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentStats:
    """First calibration pass: what the transforms need.

    Attributes:
        in_moment: (hidden, hidden), float64, E[x^T x] of the normalised inputs, averaged over layers, or None where
            the layers differ in width.
        layers: one LayerMoments a block.
        samples: tokens that each block saw, averaged over blocks.
    """

    in_moment: Tensor | None
    layers: tuple[LayerMoments, ...]
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A static range, zero included.

    Attributes:
        low: (groups,), float32, at most 0.
        high: (groups,), float32, at least 0.
    """

    low: Tensor
    high: Tensor

    @property
    def amax(self) -> Tensor:
        """(groups,), max(-low, high)."""
        return torch.maximum(-self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeStats:
    """Second calibration pass: static ranges of the transformed model.

    Attributes:
        layers: one mapping a block, from site name (see mambaquant_ext.model.forward.Tap) to its range.
        head: of the head's input, one group, or None for a model without an int8 head.
    """

    layers: tuple[Mapping[str, Range], ...]
    head: Range | None
