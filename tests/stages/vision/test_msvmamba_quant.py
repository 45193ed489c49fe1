"""MSVMamba quantized: a fine map, a coarser one in three walks of one state, their normalised sum."""

import copy
from functools import cache

import pytest
import torch

from mambaquant_ext.calibrate import ModuleRun
from mambaquant_ext.model.vision.msvmamba import MSVMamba, MSVMambaConfig
from mambaquant_ext.pipeline import ModuleSource
from stages.vision import quantizing
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR

CONFIG = MSVMambaConfig(depths=(1, 2), dims=(8, 16), classes=5, dstate=4)
NAMES = ["layers.0.blocks.0.op", "layers.1.blocks.0.op", "layers.1.blocks.1.op"]
SHAPES = [(2, 3, 24, 32), (2, 3, 20, 28)]  # maps of 6 x 8 and 3 x 4; 5 x 7 and 3 x 4: odd sides


@cache
def model():
    return quantizing.uneven_model(MSVMamba, CONFIG)


@cache
def batches(count=2):
    return quantizing.random_batches(SHAPES[0], count)


@cache
def unseen(shape=SHAPES[0]):
    return quantizing.random_batches(shape, 1, seed=5)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_weights_are_the_model(shape):
    quantizing.assert_stand_ins_equal(model(), unseen(shape))


@pytest.mark.parametrize("name", quantizing.RECIPES)
def test_transforms_keep_the_function(name):
    error = quantizing.preserved(model(), batches(), quantizing.RECIPES[name])
    assert error < RELATIVE_ERROR[torch.float64]


def test_the_state_is_carried_between_the_coarse_routes():
    source = ModuleSource(model())
    layers = [
        layer.replace(
            routes=tuple(
                type(route)(route.order, route.reverse, route.branch) for route in layer.routes
            )
        )
        for layer in source.layers
    ]
    run = ModuleRun(copy.deepcopy(source.model), source.sites, layers, None)
    with torch.no_grad():
        error = (run.model(unseen()) - source.model(unseen())).abs().max()
    assert error > 1e-4 * source.model(unseen()).abs().max()


def test_quantizing_swaps_mixers_and_head_alone():
    quantizing.assert_swaps_exactly(model(), batches(), NAMES, "classifier.head")


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compute_what_the_emulation_does(shape):
    found = quantizing.assert_integer_equals_emulated(model(), batches(8), unseen(shape))
    assert found >= MODEL_SQNR_DB["msvmamba"]


def test_checkpoints_give_the_same_bits(tmp_path):
    quantizing.assert_survives_saving(model(), batches(), unseen(), tmp_path)


def test_an_image_does_not_depend_on_its_batch():
    quantized, _ = quantizing.quantized(model(), batches())
    quantizing.assert_rows_stand_alone(quantized.get_submodule(NAMES[1]), torch.randn(5, 5, 7, 16))
