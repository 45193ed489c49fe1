"""MHS-VM quantized: heads on parts of the channels, four routes each, gated by their variation."""

from functools import cache

import pytest
import torch

from mambaquant_ext.calibrate import check_stand_ins
from mambaquant_ext.model.vision.mhs_vm import MHSConfig, MHSUNet
from mambaquant_ext.pipeline import ModuleSource
from stages.vision import quantizing
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR

SIZES = {"depths": (1, 1), "decoder_depths": (1, 1), "classes": 2, "dstate": 2}
CONFIGS = {
    "gated": MHSConfig(**SIZES, hidden=16),
    "ungated": MHSConfig(**SIZES, hidden=12, heads=3, is_gated=False, gate_threshold=0.0),
}
NAMES = [
    f"{side}.{i}.blocks.0.self_attention.mhs" for side in ("layers", "layers_up") for i in (0, 1)
]
SHAPE = (2, 3, 24, 32)  # maps of 6 x 8 and 3 x 4


@cache
def model(variant):
    return quantizing.uneven_model(MHSUNet, CONFIGS[variant])


@cache
def batches(count=2):
    return quantizing.random_batches(SHAPE, count)


@cache
def unseen():
    return quantizing.random_batches(SHAPE, 1, seed=5)[0]


@pytest.mark.parametrize("variant", CONFIGS)
def test_plain_weights_are_the_model(variant):
    quantizing.assert_stand_ins_equal(model(variant), unseen())


@pytest.mark.parametrize("name", quantizing.RECIPES)
def test_transforms_keep_the_function(name):
    error = quantizing.preserved(model("gated"), batches(), quantizing.RECIPES[name])
    assert error < RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("variant", CONFIGS)
def test_quantizing_swaps_the_multi_head_scans_alone(variant):
    quantizing.assert_swaps_exactly(model(variant), batches(), NAMES)


@pytest.mark.parametrize("variant", CONFIGS)
def test_kernels_compute_what_the_emulation_does(variant):
    found = quantizing.assert_integer_equals_emulated(model(variant), batches(8), unseen())
    assert found >= MODEL_SQNR_DB[f"mhs_vm {variant}"]


def test_checkpoints_give_the_same_bits(tmp_path):
    quantizing.assert_survives_saving(model("gated"), batches(), unseen(), tmp_path)


def test_an_image_does_not_depend_on_its_batch():
    quantized, _ = quantizing.quantized(model("gated"), batches())
    quantizing.assert_rows_stand_alone(quantized.get_submodule(NAMES[1]), torch.randn(5, 5, 7, 32))


def test_heads_without_a_projection_are_refused_by_name():
    bare = MHSUNet(MHSConfig(**SIZES, hidden=16, has_projection=False))
    with pytest.raises(
        ValueError, match=r"layers\.0\.blocks\.0\.self_attention\.mhs: .*has_projection=False"
    ):
        ModuleSource(bare)


def test_heads_with_several_thresholds_are_refused():
    uneven = MHSUNet(CONFIGS["gated"])
    uneven.layers[1].blocks[0].self_attention.mhs.heads[2].esfusion.threshold = 0.25
    with pytest.raises(
        ValueError, match=r"layers\.1.*one threshold for all heads, got \[0\.25, 0\.5\]"
    ):
        ModuleSource(uneven)


def test_rounding_that_the_fusion_amplifies_is_no_wrong_description():
    """At its initial weights routes agree so closely that float32 outputs differ by more than a wrong weight makes."""
    torch.manual_seed(0)
    deep = MHSUNet(MHSConfig(hidden=32)).eval().requires_grad_(False)
    source = ModuleSource(deep)
    images = quantizing.random_batches((1, 3, 64, 64), 1)[0]
    check_stand_ins(deep, source.sites, source.layers, images, "mhs_vm")
    # In float64, too, a threshold that is off by a hundredth is seen.
    wrong = [layer.replace(merge_threshold=layer.merge_threshold + 0.01) for layer in source.layers]
    with pytest.raises(
        ValueError, match=r"adapter 'mhs_vm' .*layers\.0\.blocks\.0\.self_attention"
    ):
        check_stand_ins(deep, source.sites, wrong, images, "mhs_vm")
