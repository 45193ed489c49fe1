"""The table of spreads and outliers: its rows, and what the transforms do to them on data that they were made from."""

import json

import pytest
import torch

from mambaquant_ext.config import PRESETS, Rotation
from mambaquant_ext.inspection import STEPS, inspect_transforms, transform_steps
from mambaquant_ext.model import language_model_forward
from mambaquant_ext.pipeline import LanguageSource
from stages import models

MAMBAQUANT = PRESETS["w8a8"]
geometries = pytest.mark.parametrize("sizes", models.GEOMETRIES, ids=lambda sizes: sizes.name)
ORDER = {
    "centre": {"dt"},
    "S1": {"in"},
    "S2": {"out"},
    "S4": {"h", "C"},
    "S5": {"dt"},
    "R1": {"in"},
    "R2": {"out"},
    "R4": {"h", "C"},
    "R5": {"dt"},
}
ON = {
    "w8a8": ["centre", "S2", "S4", "S5", "R1", "R2", "R4", "R5"],
    "rtn": [],
    "smoothquant": ["S1"],
    "quarot": ["R1", "R2", "R4", "R5"],
}


def inspected(sizes, recipe):
    return inspect_transforms(source(sizes), models.batches(sizes), recipe)


def source(sizes):
    return LanguageSource(models.model(sizes).to(torch.float32))


def table(rows):
    """(site, step) to one statistics row a layer."""
    found = {}
    for row in rows:
        found.setdefault((row.site, row.step), []).append(row)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_every_transform_that_is_on_has_a_row_for_every_site_it_changes(name):
    sizes = models.REAL
    events = []
    rows = inspect_transforms(source(sizes), models.batches(sizes), PRESETS[name], events.append)
    steps = ON[name]
    expected = [("float", site) for site in sorted(STEPS)] * sizes.layers
    expected += [(step, site) for step in steps for site in sorted(ORDER[step]) * sizes.layers]
    assert [(row.step, row.site) for row in rows] == expected
    assert {row.layer for row in rows} == set(range(sizes.layers))
    assert events == list(range(1, len(steps) + 2))
    assert transform_steps(PRESETS[name]) == len(steps) + 1


@geometries
def test_the_float_rows_are_the_statistics_of_the_activations(sizes):
    model = source(sizes).folded_run(MAMBAQUANT).model
    caught = {}

    def tap_of(layer):
        def tap(site, value):
            caught.setdefault((layer, site.removesuffix(".0")), []).append(value.flatten(0, -2))
            return value

        return tap

    for ids in models.batches(sizes):
        language_model_forward(model, ids, tap_of)
    rows = [row for row in inspected(sizes, MAMBAQUANT) if row.step == "float"]
    assert len(rows) == sizes.layers * len(STEPS)
    for row in rows:
        values = torch.cat(caught[row.layer, row.site]).double()
        variance = values.var(0, correction=0)
        rms = values.square().mean().sqrt()
        assert row.variance_spread == pytest.approx(float(variance.max() / variance.median()))
        assert row.max_over_rms == pytest.approx(float(values.abs().max() / rms))


@pytest.mark.parametrize("sizes", [models.REAL, models.ASYMMETRIC], ids=lambda sizes: sizes.name)
def test_the_klt_brings_the_spread_of_dt_near_one_and_hadamard_alone_does_not(sizes):
    """Every rotated channel has one mean square; its variance differs by the mean that centring leaves."""
    klt = table(inspected(sizes, MAMBAQUANT))
    hadamard = table(inspected(sizes, MAMBAQUANT.replace(dt_rotation=Rotation.HADAMARD)))
    for before, after, other in zip(
        klt["dt", "S5"], klt["dt", "R5"], hadamard["dt", "R5"], strict=True
    ):
        assert after.variance_spread < 1.5
        assert after.variance_spread < before.variance_spread
        assert after.variance_spread < other.variance_spread


@geometries
def test_the_klt_lowers_the_spread_of_the_block_inputs_towards_one(sizes):
    """R1 is one matrix for all layers: their average is level, each layer nearly so."""
    found = table(inspected(sizes, MAMBAQUANT))
    for before, after in zip(found["in", "float"], found["in", "R1"], strict=True):
        assert before.variance_spread > 2
        assert after.variance_spread < 2
        assert after.variance_spread < 0.7 * before.variance_spread


def with_outliers(sizes, factor=30):
    """A model whose gate is `factor` times larger in two channels of every block."""

    def one(layer):
        scale = torch.ones(sizes.dim, dtype=torch.float64)
        scale[[3, 40]] = factor
        return layer.replace(in_z=layer.in_z * scale[:, None], out=layer.out / scale)

    model = models.model(sizes)
    model = model.replace(layers=tuple(one(layer) for layer in model.layers))
    return LanguageSource(model.to(torch.float32))


@geometries
def test_smoothing_then_rotating_lowers_the_outliers_of_out(sizes):
    found = table(inspect_transforms(with_outliers(sizes), models.batches(sizes), MAMBAQUANT))
    for raw, smoothed, rotated in zip(
        found["out", "float"], found["out", "S2"], found["out", "R2"], strict=True
    ):
        assert smoothed.variance_spread < raw.variance_spread / 3
        assert rotated.variance_spread < smoothed.variance_spread / 3
        assert rotated.variance_spread < 3
        assert rotated.max_over_rms < 0.7 * smoothed.max_over_rms
        assert rotated.max_over_rms < 0.7 * raw.max_over_rms


def test_rows_are_ready_for_json():
    rows = inspected(models.POWER_OF_TWO, PRESETS["rtn"])
    values = json.loads(json.dumps([row.to_dict() for row in rows]))
    assert values[0] == {
        "layer": 0,
        "site": "C",
        "step": "float",
        "variance_spread": rows[0].variance_spread,
        "max_over_rms": rows[0].max_over_rms,
    }


def test_batches_may_be_a_stream_of_any_kind():
    sizes = models.POWER_OF_TWO
    stream = ({"input_ids": ids} for ids in models.batches(sizes))
    assert inspect_transforms(source(sizes), stream, MAMBAQUANT) == inspected(sizes, MAMBAQUANT)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="expected at least one batch of tokens, got none"):
        inspect_transforms(source(models.REAL), [], MAMBAQUANT)
