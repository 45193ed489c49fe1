"""Quantized RSMamba: its walks and their merge as one block, that transforms keep it, and that it runs on integers."""

import dataclasses
from functools import cache

import pytest
import torch

from mambaquant_ext import recipe
from mambaquant_ext.artifacts import Merge, Skip
from mambaquant_ext.model.adapters import adapter_for, adapter_of_config
from mambaquant_ext.model.vision import PathType, RSMamba, RSMambaConfig
from mambaquant_ext.routes import TokenOrder
from stages.vision.quantizing import (
    RECIPES,
    assert_integer_equals_emulated,
    assert_rows_stand_alone,
    assert_stand_ins_equal,
    assert_survives_saving,
    assert_swaps_exactly,
    preserved,
    quantized,
    random_batches,
    transformed,
    uneven_model,
)
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR

# Patches of four pixels, three apart: four along each axis.
CONFIG = RSMambaConfig(
    embed_dim=48, depth=2, num_classes=7, img_size=12, patch_size=4, stride=3, shuffle_seed=5
)
path_types = pytest.mark.parametrize("path_type", PathType)


@cache
def model(path_type, **changes):
    """None of the tests changes it."""
    return uneven_model(RSMamba, dataclasses.replace(CONFIG, path_type=path_type, **changes))


@cache
def batches():
    return random_batches((4, 3, 12, 12), 3)


@cache
def unseen(count=3):
    return random_batches((count, 3, 12, 12), 1, seed=9)[0]


@path_types
def test_stand_ins_are_the_layers(path_type):
    assert_stand_ins_equal(model(path_type), batches()[0])


@pytest.mark.parametrize("path_type", [p for p in PathType if not p.is_gated])
def test_a_mean_takes_biases(path_type):
    biased = model(path_type, in_proj_bias=True, out_proj_bias=True, final_norm=False)
    assert_stand_ins_equal(biased, batches()[0])


@pytest.mark.parametrize("path_type", [p for p in PathType if p.is_gated])
def test_a_gate_behind_a_bias_is_refused(path_type):
    biased = model(path_type, out_proj_bias=True)
    match = r"^backbone\.layers\.0: expected no bias of out_proj with gated paths, got one"
    with pytest.raises(ValueError, match=match):
        quantized(biased, batches())


@path_types
def test_w8a8_keeps_the_function(path_type):
    found = preserved(model(path_type), batches(), recipe("w8a8"))
    assert found <= RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("path_type", [PathType.SHUFFLE_MEAN, PathType.SHUFFLE_GATE])
def test_transforms_keep_the_function(path_type, recipe):
    assert preserved(model(path_type), batches(), recipe) <= RELATIVE_ERROR[torch.float64]


def test_a_layer_is_one_block_with_a_gated_merge():
    run, _ = transformed(model(PathType.SHUFFLE_GATE), batches(), recipe("w8a8"))
    for index, layer in enumerate(run.layers):
        assert (layer.norm, layer.skip, layer.merge) == (None, Skip.NONE, Merge.GATED)
        assert layer.merge_gate.shape == (3, 3, 96)
        assert (len(layer.convs), len(layer.branches)) == (1, 1)
        assert layer.convs[0].along_route
        assert layer.has_in_rotation
        walks = [route.walk((16,)).tolist() for route in layer.routes]
        there = list(range(16))
        assert walks == [there, there[::-1], CONFIG.permutation(index).tolist()]


def test_a_seed_is_one_permutation_for_good():
    """A checkpoint holds the seed and no tokens."""
    assert TokenOrder("shuffle", (0,)).indices((2, 4)).tolist() == [3, 7, 5, 2, 4, 1, 6, 0]
    assert TokenOrder("shuffle", (7,)).indices((8,)).tolist() == [6, 3, 1, 0, 5, 7, 4, 2]


@path_types
def test_layers_and_head_are_swapped_and_nothing_else(path_type):
    layers = ["backbone.layers.0", "backbone.layers.1"]
    assert_swaps_exactly(model(path_type), batches(), layers, "head.fc")


@path_types
def test_integers_are_their_emulation_and_close_to_float(path_type):
    found = assert_integer_equals_emulated(model(path_type), batches(), unseen(12))
    assert found >= MODEL_SQNR_DB[f"rsmamba {path_type.value}"]


@path_types
def test_a_saved_model_is_the_model(path_type, tmp_path):
    assert_survives_saving(model(path_type), batches(), unseen(), tmp_path)


@path_types
def test_a_sample_does_not_depend_on_its_batch(path_type):
    found, _ = quantized(model(path_type), batches())
    assert_rows_stand_alone(found, unseen())


@pytest.mark.parametrize("path_type", [PathType.SHUFFLE_MEAN, PathType.SHUFFLE_GATE])
def test_a_sample_does_not_depend_on_its_batch_on_any_isa(path_type, isa):
    found, _ = quantized(model(path_type), batches())
    assert_rows_stand_alone(found, unseen())


def test_the_configuration_names_its_adapter():
    float_model = model(PathType.REVERSE_GATE)
    adapter = adapter_for(float_model)
    config = adapter.config(float_model)
    assert adapter_of_config(config) is adapter
    assert adapter.build(config).config == float_model.config
