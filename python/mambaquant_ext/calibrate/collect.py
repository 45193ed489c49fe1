"""The two calibration passes: moments of the float model, then ranges of the transformed one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext.artifacts import BranchMoments, LayerMoments, MomentStats, Range, RangeStats
from mambaquant_ext.calibrate.observers import RangeObserver
from mambaquant_ext.calibrate.runs import CalibrationRun
from mambaquant_ext.config import Granularity, Observer, Recipe
from mambaquant_ext.model import MixerWeights
from mambaquant_ext.model.forward import Tap, no_tap

# Called with the number of batches done so far.
Progress = Callable[[int], None]


class _BranchMoments:
    """Running moments of one branch."""

    def __init__(self) -> None:
        self.extremes: dict[str, Tensor] = {}
        self.dt_sum: Tensor | float = 0.0
        self.dt_moment: Tensor | float = 0.0
        self.samples = 0

    def see(self, site: str, rows: Tensor) -> None:
        if site in ("C", "h"):
            _raise_to(self.extremes, site, rows.abs().amax(0))
        if site == "dt":
            _raise_to(self.extremes, "dt_high", rows.amax(0))
            _raise_to(self.extremes, "dt_low", -rows.amin(0))
            self.dt_sum = self.dt_sum + rows.double().sum(0)
            self.dt_moment = self.dt_moment + (rows.T @ rows).double()
            self.samples += rows.shape[0]

    def result(self) -> BranchMoments:
        _check_finite(self.extremes)
        assert isinstance(self.dt_sum, Tensor) and isinstance(self.dt_moment, Tensor)
        return BranchMoments(
            dt_min=-self.extremes["dt_low"],
            dt_max=self.extremes["dt_high"],
            dt_mean=self.dt_sum / self.samples,
            dt_moment=self.dt_moment / self.samples,
            h_amax=self.extremes["h"],
            C_amax=self.extremes["C"],
            samples=self.samples,
        )


class _Moments:
    """Running moments of one block."""

    def __init__(self, branches: int) -> None:
        self.extremes: dict[str, Tensor] = {}
        self.branches = [_BranchMoments() for _ in range(branches)]
        self.in_moment: Tensor | float = 0.0
        self.samples = 0

    def tap(self, site: str, value: Tensor) -> Tensor:
        rows = value.flatten(0, -2)
        name, _, index = site.partition(".")
        if name in ("dt", "C", "h"):
            self.branches[int(index)].see(name, rows)
        if name in ("in", "out"):
            _raise_to(self.extremes, name, rows.abs().amax(0))
        if name == "in":
            self.in_moment = self.in_moment + (rows.T @ rows).double()
            self.samples += rows.shape[0]
        return value

    def result(self) -> LayerMoments:
        _check_finite(self.extremes)
        return LayerMoments(
            in_amax=self.extremes["in"],
            out_amax=self.extremes["out"],
            branches=tuple(branch.result() for branch in self.branches),
        )


def _raise_to(extremes: dict[str, Tensor], name: str, value: Tensor) -> None:
    known = extremes.get(name)
    extremes[name] = value if known is None else torch.maximum(known, value)


def _check_finite(extremes: dict[str, Tensor]) -> None:
    for name, extreme in extremes.items():
        if not bool(extreme.isfinite().all()):
            raise ValueError(f"calibration: expected finite activations, got inf or NaN in {name}")


@torch.no_grad()
def collect_moments(
    model: CalibrationRun, batches: Iterable[Any], progress: Progress = lambda _done: None
) -> MomentStats:
    """First pass: what the transforms are made from.

    Args:
        model: float32, with norms folded if the transforms expect that.
        batches: of calibration data; read once, one at a time.
        progress: called after each batch.

    Returns:
        Statistics over all tokens of all batches.

    Raises:
        ValueError: no batches, a batch that the model refuses, or activations that are not finite.
    """
    layers = [_Moments(len(layer.branches)) for layer in model.layers]
    _run_all(model, batches, [layer.tap for layer in layers], no_tap, progress)
    moments = [layer.in_moment for layer in layers]
    samples = sum(layer.samples for layer in layers)
    _check_some(samples)
    results = tuple(layer.result() for layer in layers)
    total: Tensor | None = None
    if len({layer.hidden for layer in model.layers}) == 1:
        total = torch.zeros(model.layers[0].hidden, model.layers[0].hidden, dtype=torch.float64)
        for moment in moments:
            total += moment
        total /= samples
    return MomentStats(in_moment=total, layers=results, samples=samples // len(layers))


def _observers(layer: MixerWeights, recipe: Recipe) -> dict[str, RangeObserver]:
    """One observer a site.

    Where the kernels take one scale a channel at no cost, the recipe decides; what a matrix product contracts over
    has one scale for the tensor (algorithm section 6.3).
    """
    levels = 2**recipe.activation_bits - 1
    free = recipe.granularity is Granularity.PER_CHANNEL

    def observer(
        per_channel: bool, kind: Observer = recipe.observer, steps: int = levels
    ) -> RangeObserver:
        return RangeObserver(kind, recipe.percentile, per_channel, steps)

    sites = {"in": observer(False), "xs": observer(free), "out": observer(False)}
    if layer.in_z is not None:
        sites["z"] = observer(free, steps=2**recipe.gate_bits - 1)
    if layer.class_token is not None:
        sites["out.class"] = observer(False)
    for index in range(len(layer.convs)):
        sites[f"x.{index}"] = observer(free)
    for index in range(len(layer.branches)):
        sites[f"dt.{index}"] = observer(False)
        sites[f"B.{index}"] = observer(free)
        sites[f"C.{index}"] = observer(False)
        # Absolute maximum: a histogram of batch * seqlen * dim * dstate states would cost more than the model.
        sites[f"h.{index}"] = observer(free, Observer.ABSMAX)
    return sites


def _range_tap(observers: dict[str, RangeObserver]) -> Tap:
    def tap(site: str, value: Tensor) -> Tensor:
        # A state's scale belongs to its channel and is symmetric: one maximum over its states will do.
        is_state = site.startswith("h.")
        observers[site].observe(value.abs().amax(-1) if is_state else value)
        return value

    return tap


@torch.no_grad()
def collect_ranges(
    model: CalibrationRun,
    batches: Iterable[Any],
    recipe: Recipe,
    progress: Progress = lambda _done: None,
) -> RangeStats:
    """Second pass: static ranges of every tensor that becomes int8.

    Args:
        model: float32, transformed.
        batches: of calibration data; read once, one at a time.
        recipe: observer, percentile, granularity and bits.
        progress: called after each batch.

    Returns:
        Ranges over all tokens of all batches.

    Raises:
        ValueError: no batches, a batch that the model refuses, or activations that are not finite.
    """
    layers = [_observers(layer, recipe) for layer in model.layers]
    head = RangeObserver(recipe.observer, recipe.percentile, False, 2**recipe.activation_bits - 1)
    sees_head = False

    def head_tap(_site: str, value: Tensor) -> Tensor:
        nonlocal sees_head
        sees_head = True
        head.observe(value)
        return value

    taps = [_range_tap(layer) for layer in layers]
    _check_some(_run_all(model, batches, taps, head_tap, progress))
    return RangeStats(
        layers=tuple(_ranges(layer) for layer in layers),
        head=head.range() if sees_head else None,
    )


def _ranges(observers: dict[str, RangeObserver]) -> dict[str, Range]:
    return {site: observer.range() for site, observer in observers.items()}


def _run_all(
    model: CalibrationRun,
    batches: Iterable[Any],
    taps: list[Tap],
    head_tap: Tap,
    progress: Progress,
) -> int:
    """Runs every batch; returns their number."""
    done = 0
    for done, batch in enumerate(batches, 1):
        model.run(batch, taps.__getitem__, head_tap)
        progress(done)
    return done


def _check_some(count: int) -> None:
    if count == 0:
        raise ValueError("calibration: expected at least one batch of tokens, got none")
