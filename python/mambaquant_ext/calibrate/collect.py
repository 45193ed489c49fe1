"""The two calibration passes: moments of the float model, then ranges of the transformed one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext.artifacts import LayerMoments, MomentStats, Range, RangeStats
from mambaquant_ext.calibrate.observers import RangeObserver
from mambaquant_ext.config import Granularity, Observer, Recipe
from mambaquant_ext.model import (
    LanguageModelWeights,
    MixerWeights,
    language_model_forward,
    mixer_forward,
)
from mambaquant_ext.model.forward import Tap

# Called with the number of batches done so far.
Progress = Callable[[int], None]


def token_ids(batch: Any) -> Tensor:
    """The token ids of a batch.

    Args:
        batch: (batch, seqlen) or (seqlen,) integer tensor, or a mapping with such a tensor as "input_ids" and
            no padding in "attention_mask": statistics are over all tokens.

    Returns:
        (batch, seqlen), int64.

    Raises:
        ValueError: another shape, no tokens, a mapping without "input_ids", or padding.
        TypeError: another type or dtype.
    """
    ids = batch
    if hasattr(batch, "keys"):
        if "input_ids" not in batch:
            raise ValueError(
                f"calibration batch: expected a mapping with input_ids, got {', '.join(map(str, batch.keys()))}"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.all()):
            padding = int((mask == 0).sum())
            raise ValueError(
                f"calibration batch: expected no padding, got attention_mask with {padding} zero(s)"
            )
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"calibration batch: expected a tensor of token ids, got {type(ids).__name__}"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"calibration batch: expected integer token ids, got {ids.dtype}")
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"calibration batch: expected shape (batch, seqlen), got {tuple(ids.shape)}"
        )
    return ids.long()


class _Moments:
    """Running moments of one block."""

    def __init__(self) -> None:
        self.extremes: dict[str, Tensor] = {}
        self.in_moment: Tensor | float = 0.0
        self.dt_sum: Tensor | float = 0.0
        self.dt_moment: Tensor | float = 0.0

    def _raise_to(self, name: str, value: Tensor) -> None:
        known = self.extremes.get(name)
        self.extremes[name] = value if known is None else torch.maximum(known, value)

    def tap(self, site: str, value: Tensor) -> Tensor:
        rows = value.flatten(0, -2)
        if site in ("in", "out", "C", "h"):
            self._raise_to(site, rows.abs().amax(0))
        if site == "in":
            self.in_moment = self.in_moment + (rows.T @ rows).double()
        if site == "dt":
            self._raise_to("dt_high", rows.amax(0))
            self._raise_to("dt_low", -rows.amin(0))
            self.dt_sum = self.dt_sum + rows.double().sum(0)
            self.dt_moment = self.dt_moment + (rows.T @ rows).double()
        return value

    def result(self, samples: int) -> LayerMoments:
        assert isinstance(self.dt_sum, Tensor) and isinstance(self.dt_moment, Tensor)
        for name, extreme in self.extremes.items():
            if not bool(extreme.isfinite().all()):
                raise ValueError(
                    f"calibration: expected finite activations, got inf or NaN in {name}"
                )
        return LayerMoments(
            in_amax=self.extremes["in"],
            out_amax=self.extremes["out"],
            dt_min=-self.extremes["dt_low"],
            dt_max=self.extremes["dt_high"],
            dt_mean=self.dt_sum / samples,
            dt_moment=self.dt_moment / samples,
            h_amax=self.extremes["h"],
            C_amax=self.extremes["C"],
        )


@torch.no_grad()
def collect_moments(
    model: LanguageModelWeights, batches: Iterable[Any], progress: Progress = lambda _done: None
) -> MomentStats:
    """First pass: what the transforms are made from.

    Args:
        model: float32, with norms folded if the transforms expect that.
        batches: token batches, see `token_ids`; read once, one at a time.
        progress: called after each batch.

    Returns:
        Statistics over all tokens of all batches.

    Raises:
        ValueError: no batches, ids outside the vocabulary, or activations that are not finite.
    """
    layers = [_Moments() for _ in model.layers]
    samples = 0
    for done, batch in enumerate(batches, 1):
        ids = _checked_ids(batch, model)
        language_model_forward(model, ids, lambda index: layers[index].tap)
        samples += ids.numel()
        progress(done)
    _check_some(samples)
    results = tuple(layer.result(samples) for layer in layers)
    total = torch.zeros(model.embedding.shape[1], model.embedding.shape[1], dtype=torch.float64)
    for layer in layers:
        total += layer.in_moment
    return MomentStats(in_moment=total / (samples * len(layers)), layers=results, samples=samples)


def _observers(recipe: Recipe) -> dict[str, RangeObserver]:
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

    return {
        "in": observer(False),
        "xs": observer(free),
        "z": observer(free, steps=2**recipe.gate_bits - 1),
        "x": observer(free),
        "dt": observer(False),
        "B": observer(free),
        "C": observer(False),
        # Absolute maximum: a histogram of batch * seqlen * dim * dstate states would cost more than the model.
        "h": observer(free, Observer.ABSMAX),
        "out": observer(False),
    }


def _range_tap(observers: dict[str, RangeObserver]) -> Tap:
    def tap(site: str, value: Tensor) -> Tensor:
        # A state's scale belongs to its channel and is symmetric: one maximum over its states will do.
        observers[site].observe(value.abs().amax(-1) if site == "h" else value)
        return value

    return tap


def _ranges(observers: dict[str, RangeObserver]) -> dict[str, Range]:
    return {site: observer.range() for site, observer in observers.items()}


@torch.no_grad()
def collect_ranges(
    model: LanguageModelWeights,
    batches: Iterable[Any],
    recipe: Recipe,
    progress: Progress = lambda _done: None,
) -> RangeStats:
    """Second pass: static ranges of every tensor that becomes int8.

    Args:
        model: float32, transformed.
        batches: token batches, see `token_ids`; read once, one at a time.
        recipe: observer, percentile, granularity and bits.
        progress: called after each batch.

    Returns:
        Ranges over all tokens of all batches.

    Raises:
        ValueError: no batches, ids outside the vocabulary, or activations that are not finite.
    """
    layers = [_observers(recipe) for _ in model.layers]
    head = _observers(recipe)["in"]

    def head_tap(_site: str, value: Tensor) -> Tensor:
        head.observe(value)
        return value

    samples = 0
    for done, batch in enumerate(batches, 1):
        ids = _checked_ids(batch, model)
        language_model_forward(model, ids, lambda index: _range_tap(layers[index]), head_tap)
        samples += ids.numel()
        progress(done)
    _check_some(samples)
    return RangeStats(
        layers=tuple(_ranges(layer) for layer in layers),
        head=head.range(),
        samples=samples,
    )


@torch.no_grad()
def block_moments(layer: MixerWeights, inputs: Iterable[Tensor]) -> tuple[LayerMoments, int]:
    """collect_moments for one block on given inputs.

    Args:
        layer: float32.
        inputs: each (batch, seqlen, hidden).

    Returns:
        The moments, and the number of tokens.

    Raises:
        ValueError: no inputs, or activations that are not finite.
    """
    moments, samples = _Moments(), 0
    for hidden_states in inputs:
        mixer_forward(layer, hidden_states.float(), tap=moments.tap)
        samples += hidden_states.shape[0] * hidden_states.shape[1]
    _check_some(samples)
    return moments.result(samples), samples


@torch.no_grad()
def block_ranges(layer: MixerWeights, inputs: Iterable[Tensor], recipe: Recipe) -> dict[str, Range]:
    """collect_ranges for one block on given inputs.

    Args:
        layer: float32, transformed.
        inputs: each (batch, seqlen, hidden).
        recipe: observer, percentile, granularity and bits.

    Raises:
        ValueError: no inputs, or activations that are not finite.
    """
    observers = _observers(recipe)
    for hidden_states in inputs:
        mixer_forward(layer, hidden_states.float(), tap=_range_tap(observers))
    return _ranges(observers)


def _checked_ids(batch: Any, model: LanguageModelWeights) -> Tensor:
    ids = token_ids(batch)
    vocab = model.embedding.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(
            f"calibration batch: expected token ids from 0 to {vocab - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    return ids


def _check_some(samples: int) -> None:
    if samples == 0:
        raise ValueError("calibration: expected at least one batch of tokens, got none")
