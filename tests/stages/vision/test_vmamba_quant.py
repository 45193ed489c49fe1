"""VMamba quantized: its blocks as plain weights, transforms, kernels, checkpoints; and its mixer in other models."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

from mambaquant_ext.model.adapters import adapter_for
from mambaquant_ext.model.vision.vmamba import SS2D, VMamba, VMambaConfig
from mambaquant_ext.pipeline import ModuleSource
from stages.vision import quantizing
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR

SIZES = {"depths": (1, 2), "dims": (8, 16), "classes": 5}
CONFIGS = {
    "gated": VMambaConfig(
        **SIZES, dstate=4, ssm_ratio=2.0, has_gate=True, has_conv_bias=True, mlp_ratio=0.0
    ),
    "gateless": VMambaConfig(**SIZES),
}
NAMES = ["layers.0.blocks.0.op", "layers.1.blocks.0.op", "layers.1.blocks.1.op"]
SHAPE = (2, 3, 24, 32)  # maps of 6 x 8 and 3 x 4


@cache
def model(variant):
    return quantizing.uneven_model(VMamba, CONFIGS[variant])


@cache
def batches(count=2):
    return quantizing.random_batches(SHAPE, count)


@cache
def unseen():
    return quantizing.random_batches(SHAPE, 1, seed=5)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_is_refused_by_name(dtype):
    """Its blocks would be calibrated in float32, what surrounds them in half."""
    half = copy.deepcopy(model("gated")).to(dtype)
    with pytest.raises(TypeError, match=rf"expected float32, got {dtype}; call model\.float\(\)"):
        ModuleSource(half)


@pytest.mark.parametrize("variant", CONFIGS)
def test_plain_weights_are_the_model(variant):
    quantizing.assert_stand_ins_equal(model(variant), unseen())


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("name", quantizing.RECIPES)
def test_transforms_keep_the_function(variant, name):
    error = quantizing.preserved(model(variant), batches(), quantizing.RECIPES[name])
    assert error < RELATIVE_ERROR[torch.float64]


def test_every_block_is_rotated_at_all_places():
    run, _ = quantizing.transformed(model("gated"), batches(), quantizing.RECIPES["w8a8"])
    for layer in run.layers:
        assert (layer.has_in_rotation, layer.has_out_rotation, layer.has_state_rotation) == (
            True,
        ) * 3


@pytest.mark.parametrize("variant", CONFIGS)
def test_quantizing_swaps_mixers_and_head_alone(variant):
    quantizing.assert_swaps_exactly(model(variant), batches(), NAMES, "classifier.head")


@pytest.mark.parametrize("variant", CONFIGS)
def test_kernels_compute_what_the_emulation_does(variant):
    found = quantizing.assert_integer_equals_emulated(model(variant), batches(8), unseen())
    assert found >= MODEL_SQNR_DB[f"vmamba {variant}"]


@pytest.mark.parametrize("variant", CONFIGS)
def test_checkpoints_give_the_same_bits(variant, tmp_path):
    quantizing.assert_survives_saving(model(variant), batches(), unseen(), tmp_path)


def test_an_image_does_not_depend_on_its_batch():
    quantized, _ = quantizing.quantized(model("gated"), batches())
    quantizing.assert_rows_stand_alone(quantized.get_submodule(NAMES[1]), torch.randn(5, 5, 7, 16))


# The mixer in other models


class Linear2d(nn.Linear):
    """A linear layer over the channels of a channel-first map."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FirstSS2D(SS2D):
    """A channel-first mixer, as VMamba's public code has with "ln2d"; out_proj is a 1x1 convolution."""

    channel_first = True

    def __init__(self, hidden):
        super().__init__(
            hidden=hidden,
            dim=2 * hidden,
            dt_rank=1,
            dstate=4,
            conv_width=3,
            has_conv_bias=True,
            has_gate=True,
        )
        self.in_proj = Linear2d(hidden, 4 * hidden, bias=False)
        self.out_proj = nn.Conv2d(2 * hidden, hidden, 1, bias=False)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, 1)
        y = self.scan_map(x.movedim(1, -1)).movedim(-1, 1)
        return self.out_proj(y * nn.functional.silu(z))


class Wrapped(nn.Module):
    """A model that only shares the mixer's parameter names with VMamba."""

    def __init__(self, hidden):
        super().__init__()
        self.stem = nn.Conv2d(3, hidden, 4, stride=4)
        self.mixers = nn.ModuleList([FirstSS2D(hidden), FirstSS2D(hidden)])

    def forward(self, images):
        x = self.stem(images)
        for mixer in self.mixers:
            x = x + mixer(x)
        return x


def test_a_channel_first_mixer_in_another_model():
    wrapped = quantizing.uneven_model(Wrapped, 8)
    assert adapter_for(wrapped).name == "mixers"
    quantizing.assert_stand_ins_equal(wrapped, unseen())
    quantizing.assert_swaps_exactly(wrapped, batches(), ["mixers.0", "mixers.1"])
    assert quantizing.preserved(wrapped, batches(), quantizing.RECIPES["w8a8"]) < 1e-10


def test_an_in_proj_of_another_width_is_refused_by_name():
    strange = quantizing.uneven_model(VMamba, CONFIGS["gated"])
    strange.layers[1].blocks[0].op.in_proj = nn.Linear(16, 48)
    with pytest.raises(
        ValueError, match=r"layers\.1\.blocks\.0\.op: in_proj: expected 32 or 64 rows, got 48"
    ):
        ModuleSource(strange)
