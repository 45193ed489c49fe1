"""Range observers: exact extremes, and a histogram that grows with the data, for percentile and MSE ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.artifacts import Range
from mambaquant_ext.config import Observer

BINS = 2048  # per group, symmetric about zero
CLIP_CANDIDATES = 64  # clipped ranges that the MSE observer tries


class RangeObserver:
    """Watches a stream of tensors and proposes a static range per group.

    A group is the whole tensor or one channel of its last dimension. Bins double in width when a larger value
    arrives, by merging neighbours, so that counts stay exact and memory bounded (algorithm section 1.6).
    """

    def __init__(
        self, observer: Observer, percentile: float, per_channel: bool, levels: int
    ) -> None:
        """Starts empty.

        Args:
            observer: how the range is chosen at the end.
            percentile: share of values kept, per sign, for Observer.PERCENTILE.
            per_channel: one group per channel of the last dimension, else one group.
            levels: steps of the grid that the range is for (255 for 8 bits), for Observer.MSE.
        """
        self._observer = observer
        self._percentile = percentile
        self._per_channel = per_channel
        self._levels = levels
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._limit = torch.empty(0)  # (groups,): the histogram covers [-limit, limit)
        self._counts = torch.empty(0)  # (groups, BINS)

    def observe(self, x: Tensor) -> None:
        """Adds a tensor.

        Args:
            x: (..., channels), any float dtype.

        Raises:
            ValueError: a value that is not finite.
        """
        rows = x.detach().float().reshape(-1, x.shape[-1] if self._per_channel else 1)
        if rows.numel() == 0:
            return
        low, high = rows.amin(0), rows.amax(0)
        if not bool(low.isfinite().all() & high.isfinite().all()):
            raise ValueError("RangeObserver: expected finite activations, got inf or NaN")
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if self._observer is not Observer.ABSMAX:
            self._count(rows, torch.maximum(-low, high))

    def range(self) -> Range:
        """The proposed range.

        Raises:
            ValueError: nothing was observed.
        """
        if self._low is None or self._high is None:
            raise ValueError("RangeObserver: expected at least one observed value, got none")
        low, high = self._low.clamp_max(0), self._high.clamp_min(0)
        if self._observer is Observer.PERCENTILE:
            quantile_low, quantile_high = self._quantiles()
            low, high = torch.maximum(low, quantile_low), torch.minimum(high, quantile_high)
        if self._observer is Observer.MSE:
            ratio = self._best_clip(low, high)
            low, high = low * ratio, high * ratio
        return Range(low=low, high=high)

    def _count(self, rows: Tensor, amax: Tensor) -> None:
        groups = rows.shape[1]
        if self._limit.numel() == 0:
            self._limit = amax.clamp_min(1e-12) * 1.0001
            self._counts = torch.zeros(groups, BINS, dtype=torch.float64)
        self._grow(amax)
        # floor, so that the smallest negative value is still counted with the negative ones.
        half = BINS // 2
        index = (rows * (half / self._limit)).floor_().int().clamp_(-half, half - 1)
        index += half + torch.arange(groups, dtype=torch.int32) * BINS
        self._counts += torch.bincount(index.flatten(), minlength=groups * BINS).reshape(
            groups, BINS
        )

    def _grow(self, amax: Tensor) -> None:
        while bool((amax >= self._limit).any()):
            outgrown = amax >= self._limit
            merged = torch.zeros_like(self._counts)
            quarter = BINS // 4
            merged[:, quarter : BINS - quarter] = self._counts.unflatten(1, (BINS // 2, 2)).sum(-1)
            self._counts = torch.where(outgrown[:, None], merged, self._counts)
            self._limit = torch.where(outgrown, self._limit * 2, self._limit)

    def _quantiles(self) -> tuple[Tensor, Tensor]:
        """Signed quantiles: each half reaches `percentile` of its own count, linear inside the bin."""
        half = BINS // 2
        width = self._limit / half

        def reach(counts: Tensor) -> Tensor:
            cumulative = counts.cumsum(1)
            target = cumulative[:, -1:] * self._percentile
            bin_index = (cumulative < target).sum(1, keepdim=True).clamp_max(half - 1)
            inside = counts.gather(1, bin_index)
            before = cumulative.gather(1, bin_index) - inside
            fraction = torch.where(inside > 0, (target - before) / inside, 0.0)
            return ((bin_index + fraction).squeeze(1) * width).float()

        return -reach(self._counts[:, :half].flip(1)), reach(self._counts[:, half:])

    def _best_clip(self, low: Tensor, high: Tensor) -> Tensor:
        """(groups,), the share of the full range with the least squared rounding and clipping error."""
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / (BINS / 2) - 1
        values = centres * self._limit[:, None].double()
        best_error = torch.full_like(low, torch.inf, dtype=torch.float64)
        best = torch.ones_like(low)
        for candidate in range(CLIP_CANDIDATES, CLIP_CANDIDATES // 4, -1):
            ratio = candidate / CLIP_CANDIDATES
            clip_low, clip_high = (low * ratio).double()[:, None], (high * ratio).double()[:, None]
            step = (clip_high - clip_low) / self._levels
            clipping = (values - values.clamp(clip_low, clip_high)).square()
            error = (self._counts * (clipping + step.square() / 12)).sum(1)
            best = torch.where(error < best_error, ratio, best)
            best_error = torch.minimum(error, best_error)
        return best
