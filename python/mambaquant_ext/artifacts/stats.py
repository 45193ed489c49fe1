"""Calibration statistics: what the observing passes hand to transforms and packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoments:
    """Statistics of one block that its transforms are made from.

    Attributes:
        in_amax: (hidden,), max |normalised input|.
        out_amax: (dim,), max |input of out_proj|.
        dt_min: (dt_rank,), smallest dt.
        dt_max: (dt_rank,), largest dt.
        dt_mean: (dt_rank,), mean dt.
        dt_moment: (dt_rank, dt_rank), E[dt^T dt].
        h_amax: (dstate,), max |state| per state index.
        C_amax: (dstate,), max |C| per state index.
    """

    in_amax: Tensor
    out_amax: Tensor
    dt_min: Tensor
    dt_max: Tensor
    dt_mean: Tensor
    dt_moment: Tensor
    h_amax: Tensor
    C_amax: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentStats:
    """First calibration pass: what the transforms need.

    Attributes:
        in_moment: (hidden, hidden), float64, E[x^T x] of the normalised inputs, averaged over layers.
        layers: one LayerMoments a block.
        samples: tokens seen.
    """

    in_moment: Tensor
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
        head: of lm_head's input, one group.
        samples: tokens seen.
    """

    layers: tuple[Mapping[str, Range], ...]
    head: Range
    samples: int
