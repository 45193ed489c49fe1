"""How hard a model's tensors are to quantize, before and after each transform."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext.calibrate import CalibrationRun, collect_moments
from mambaquant_ext.config import Recipe, Rotation
from mambaquant_ext.model.forward import Tap, no_tap
from mambaquant_ext.pipeline import Source

# Each site and the switches that change it, in the order in which they act.
STEPS: dict[str, tuple[tuple[str, str], ...]] = {
    "in": (("S1", "smooth_in"), ("R1", "residual_rotation")),
    "out": (("S2", "smooth_gate"), ("R2", "out_rotation")),
    "dt": (("centre", "center_dt"), ("S5", "smooth_dt"), ("R5", "dt_rotation")),
    "h": (("S4", "smooth_state"), ("R4", "state_rotation")),
    "C": (("S4", "smooth_state"), ("R4", "state_rotation")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatistics:
    """One tensor of one layer at one point of the transforms.

    Attributes:
        layer: index of the block.
        site: see mambaquant_ext.model.forward.Tap, without the index where a block has one branch; channels of "h"
            are its states.
        step: "float" or the transform just applied.
        variance_spread: largest over median channel variance; 1 is ideal.
        max_over_rms: largest magnitude over root mean square of the whole tensor.
    """

    layer: int
    site: str
    step: str
    variance_spread: float
    max_over_rms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class _ChannelMoments:
    """Running sums of one site."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.amax = 0.0

    def add(self, value: Tensor) -> None:
        rows = value.flatten(0, -2)
        self.count += rows.shape[0]
        self.sum = self.sum + rows.double().sum(0)
        self.square = self.square + rows.double().square().sum(0)
        self.amax = max(self.amax, float(rows.abs().max()))

    def statistics(self) -> tuple[float, float]:
        assert isinstance(self.sum, Tensor) and isinstance(self.square, Tensor)
        variance = self.square / self.count - (self.sum / self.count).square()
        rms = float((self.square.mean() / self.count).sqrt())
        spread = float(variance.max() / variance.median().clamp_min(1e-30))
        return spread, self.amax / max(rms, 1e-30)


@torch.no_grad()
def _observe(
    run: CalibrationRun, batches: list[Any], sites: set[str]
) -> dict[tuple[int, str], tuple[float, float]]:
    moments: dict[tuple[int, str], _ChannelMoments] = {}

    def layer_tap(index: int) -> Tap:
        def tap(site: str, value: Tensor) -> Tensor:
            name, _, _ = site.partition(".")
            if name in sites:
                is_alone = len(run.layers[index].branches) == 1
                label = name if is_alone or name in ("in", "out") else site
                moments.setdefault((index, label), _ChannelMoments()).add(value)
            return value

        return tap

    for batch in batches:
        run.run(batch, layer_tap, no_tap)
    return {key: moment.statistics() for key, moment in moments.items()}


def inspect_transforms(
    source: Source,
    batches: Iterable[Any],
    recipe: Recipe,
    progress: Callable[[int], None] = lambda _done: None,
) -> list[SiteStatistics]:
    """Channel spread and outliers of every rotated or smoothed tensor, step by step.

    Args:
        source: the float model.
        batches: see `quantize_`.
        recipe: its switches name the steps; those that are off are left out.
        progress: called with the number of steps done, of `transform_steps(recipe)`.

    Returns:
        Rows ordered by step, layer and site.

    Raises:
        ValueError, TypeError: as `quantize_`.
    """
    kept = list(batches)
    run = source.folded_run(recipe)
    moments = collect_moments(run, kept)
    off: dict[str, Any] = {
        "residual_rotation": Rotation.NONE,
        "dt_rotation": Rotation.NONE,
        "out_rotation": False,
        "state_rotation": False,
        "smooth_gate": False,
        "smooth_state": False,
        "smooth_dt": False,
        "smooth_in": False,
        "center_dt": False,
    }
    current = recipe.replace(**off)
    steps = _ordered_steps(recipe)
    rows = _rows("float", _observe(run, kept, set(STEPS)))
    progress(1)
    for done, (step, switch, sites) in enumerate(steps, 2):
        current = current.replace(**{switch: getattr(recipe, switch)})
        rows += _rows(step, _observe(source.transformed_run(moments, current), kept, sites))
        progress(done)
    return rows


def transform_steps(recipe: Recipe) -> int:
    """Steps that inspect_transforms measures: the float model and each transform that is on."""
    return 1 + len(_ordered_steps(recipe))


def _ordered_steps(recipe: Recipe) -> list[tuple[str, str, set[str]]]:
    """(label, switch, sites it changes) for every switch that is on."""
    labels = {switch: label for changes in STEPS.values() for label, switch in changes}
    order = (
        "center_dt",
        "smooth_in",
        "smooth_gate",
        "smooth_state",
        "smooth_dt",
        "residual_rotation",
        "out_rotation",
        "state_rotation",
        "dt_rotation",
    )
    return [
        (
            labels[switch],
            switch,
            {
                site
                for site, changes in STEPS.items()
                if switch in dict((s, lb) for lb, s in changes)
            },
        )
        for switch in order
        if getattr(recipe, switch) not in (False, Rotation.NONE)
    ]


def _rows(step: str, observed: dict[tuple[int, str], tuple[float, float]]) -> list[SiteStatistics]:
    return [
        SiteStatistics(layer=layer, site=site, step=step, variance_spread=spread, max_over_rms=peak)
        for (layer, site), (spread, peak) in sorted(observed.items())
    ]
