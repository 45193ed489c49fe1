"""Recipes: every field is checked and named, and survives a trip through JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambaquant_ext.config import (
    PRESETS,
    RECIPE_VERSION,
    Granularity,
    Observer,
    Recipe,
    Rotation,
    recipe,
)

FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
SWITCHES = tuple(f.name for f in dataclasses.fields(Recipe) if f.type == "bool")


def is_allowed(values):
    return (values["quantize_readout"] or not values["state_rotation"]) and (
        values["residual_rotation"] is Rotation.NONE or not values["smooth_in"]
    )


recipes = (
    st.fixed_dictionaries(
        {
            "name": st.text(),
            "weight_bits": st.integers(2, 8),
            "activation_bits": st.integers(2, 8),
            "gate_bits": st.integers(2, 8),
            "residual_rotation": st.sampled_from(Rotation),
            "dt_rotation": st.sampled_from(Rotation),
            "observer": st.sampled_from(Observer),
            "granularity": st.sampled_from(Granularity),
            "percentile": st.floats(0.5, 1, exclude_min=True),
            **{name: st.booleans() for name in SWITCHES},
        }
    )
    .filter(is_allowed)
    .map(lambda values: Recipe(**values))
)


@given(recipes)
def test_a_recipe_survives_json(made):
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert set(made.to_dict()) == set(FIELDS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_under_its_own_name(name):
    made = recipe(name)
    assert made.name == name
    json_text = json.dumps(made.to_dict())
    assert "Rotation" not in json_text
    assert Recipe.from_dict(json.loads(json_text)) == made


def test_the_presets_are_the_methods_that_their_names_say():
    """algorithm section 2.6 (the full method), and the baselines of section 5."""
    full, rtn = recipe("w8a8"), recipe("rtn")
    assert {name: getattr(full, name) for name in SWITCHES} == dict.fromkeys(SWITCHES, True) | {
        "smooth_in": False
    }
    assert full.residual_rotation is full.dt_rotation is Rotation.KLT
    assert rtn.residual_rotation is rtn.dt_rotation is Rotation.NONE
    transforms = (
        "out_rotation", "state_rotation", "smooth_gate", "smooth_state", "smooth_dt",
        "smooth_in", "center_dt", "separate_class_token",
    )  # fmt: skip
    assert not any(getattr(rtn, name) for name in transforms)
    assert recipe("smoothquant") == rtn.replace(name="smoothquant", smooth_in=True)
    assert recipe("quarot") == rtn.replace(
        name="quarot",
        residual_rotation=Rotation.HADAMARD,
        dt_rotation=Rotation.HADAMARD,
        out_rotation=True,
        state_rotation=True,
    )


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of w8a8, rtn, .*, got 'w4a8'"):
        recipe("w4a8")


def test_a_recipe_cannot_be_changed_but_copied():
    made = recipe("rtn")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.weight_bits = 4
    assert made.replace(weight_bits=4).weight_bits == 4
    assert made.weight_bits == 8


BAD = {
    "name": [None, 3],
    "weight_bits": [1, 9, 8.0, "8", True, None],
    "activation_bits": [1, 9, 4.5, None],
    "gate_bits": [0, 16, "8"],
    "residual_rotation": ["klt", "none", "walsh", True, None],
    "dt_rotation": ["hadamard", False, 1],
    "observer": ["absmax", "entropy", None],
    "granularity": ["per_token", "per_tensor", 0],
    "percentile": [0.5, 0, -1.0, 1.1, float("nan"), "0.9", None, True],
    "version": [0, 1, 3, "2", None, True],
    **{name: [1, 0, "yes", None] for name in SWITCHES},
}
bad_values = pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)


def test_every_field_has_a_bad_value():
    assert set(BAD) == set(FIELDS)


@bad_values
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^Recipe\.{field}: expected .*, got "):
        Recipe(**{"name": "x", field: value})
    with pytest.raises(ValueError, match=rf"^Recipe\.{field}: expected .*, got "):
        recipe("rtn").replace(**{field: value})


@bad_values
def test_a_bad_value_of_a_file_is_refused_by_name(field, value):
    values = recipe("rtn").to_dict()
    if isinstance(value, str) and field in ("residual_rotation", "dt_rotation", "observer"):
        value = "walsh"  # a file holds words, of which this is none
    if field == "granularity":
        value = "per_token"
    with pytest.raises(ValueError, match=rf"^(?i:recipe)\.{field}: expected .*, got "):
        Recipe.from_dict({**values, field: value})


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field):
    values = recipe("w8a8").to_dict()
    del values[field]
    with pytest.raises(ValueError, match=rf"^recipe\.{field}: "):
        Recipe.from_dict(values)


def test_an_unknown_field_and_an_unknown_version_are_named():
    values = recipe("w8a8").to_dict()
    with pytest.raises(ValueError, match=r"^recipe\.smooth_head: unknown field"):
        Recipe.from_dict({**values, "smooth_head": True})
    with pytest.raises(ValueError, match=rf"^recipe\.version: expected {RECIPE_VERSION}, got 3"):
        Recipe.from_dict({**values, "version": 3, "smooth_head": True})


def test_switches_that_exclude_each_other_are_refused():
    with pytest.raises(
        ValueError, match=r"^Recipe\.state_rotation: expected False when .*got True"
    ):
        Recipe(name="x", quantize_readout=False)
    with pytest.raises(ValueError, match=r"^Recipe\.smooth_in: expected False with .*got True"):
        Recipe(name="x", smooth_in=True)
    assert Recipe(name="x", smooth_in=True, residual_rotation=Rotation.NONE).smooth_in
    assert not Recipe(name="x", quantize_readout=False, state_rotation=False).quantize_readout
