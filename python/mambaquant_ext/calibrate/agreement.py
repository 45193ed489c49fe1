"""Whether the float stand-ins of a model's blocks compute what the model computes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.calibrate.runs import call
from mambaquant_ext.model import MixerWeights
from mambaquant_ext.model.sites import BlockSite, FloatBlock, replace_module

# Largest error over largest output. Rounding in float32 makes some 1e-6 of it, a wrong weight or route 0.01 or more.
AGREEMENT = 1e-3


def check_stand_ins(
    model: nn.Module,
    sites: Sequence[BlockSite],
    layers: Sequence[MixerWeights],
    batch: Any,
    adapter: str,
) -> None:
    """Refuses blocks that an adapter describes wrongly.

    A model may amplify rounding: where float32 does not agree, float64 decides.

    Args:
        model: float; it is left alone.
        sites: of its blocks.
        layers: their weights as the adapter reads them, float32.
        batch: see ModuleRun.run.
        adapter: its name, for the error.

    Raises:
        ValueError: another output; names the adapter and the first block that makes it another.
    """
    comparison = _Comparison(copy.deepcopy(model), sites, layers, batch)
    error = comparison.error(range(len(sites)))
    if error <= AGREEMENT:
        return
    try:
        exact = comparison.in_float64()
        error = exact.error(range(len(sites)))
    except RuntimeError:  # a model that insists on float32 somewhere
        exact = comparison
    if error <= AGREEMENT:
        return
    wrong = next((i for i in range(len(sites)) if not exact.error([i]) <= AGREEMENT), None)
    where = "its blocks together" if wrong is None else f"block {sites[wrong].name}"
    raise ValueError(
        f"adapter {adapter!r} does not describe {type(model).__name__}: with the weights that it reads in place of "
        f"{where}, the model's output is off by {error:.3g} of its largest value, expected at most {AGREEMENT}"
    )


class _Comparison:
    """A model's own output, and what stand-ins make of it."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[BlockSite],
        layers: Sequence[MixerWeights],
        batch: Any,
    ) -> None:
        self.model, self.sites, self.layers, self.batch = model.eval(), sites, layers, batch
        self.expected = self._run()

    def in_float64(self) -> _Comparison:
        """The same comparison in float64; this one's model is changed."""
        layers = [layer.to(torch.float64) for layer in self.layers]
        return _Comparison(self.model.double(), self.sites, layers, _doubled(self.batch))

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        return list(_floating_tensors(call(self.model, self.batch)))

    def error(self, indices: Sequence[int]) -> float:
        """Largest error over largest value, the worst of all output tensors; inf for outputs of another shape.

        Args:
            indices: of the sites where stand-ins run.
        """
        actual = self._run_with(indices)
        if [t.shape for t in actual] != [t.shape for t in self.expected]:
            return math.inf
        return max(map(_relative_error, actual, self.expected), default=0.0)

    def _run_with(self, indices: Sequence[int]) -> list[Tensor]:
        replaced = []
        for index in indices:
            site = self.sites[index]
            replaced.append((site.name, self.model.get_submodule(site.name)))
            site.replace_in(self.model, FloatBlock(self.layers[index], site.contract).eval())
        try:
            return self._run()
        finally:
            for name, module in reversed(replaced):
                replace_module(self.model, name, module)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """0 for a model whose own output is not finite, which is for calibration to refuse."""
    if expected.numel() == 0 or not bool(expected.isfinite().all()):
        return 0.0
    largest = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((actual.double() - expected.double()).abs().max() / largest)
    return math.inf if math.isnan(error) else error


def _floating_tensors(value: Any) -> Iterator[Tensor]:
    """All floating tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floating_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floating_tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _floating_tensors(vars(value))


def _doubled(value: Any) -> Any:
    """A batch whose floating tensors are float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, Mapping):
        return {name: _doubled(item) for name, item in value.items()}
    return [_doubled(item) for item in value] if isinstance(value, (tuple, list)) else value
