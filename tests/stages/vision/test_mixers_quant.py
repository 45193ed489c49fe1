"""Mixers in models of any kind: U-Mamba's and MambaMIM's U-Nets, and what users build themselves."""

from functools import cache

import pytest
import torch
from torch import nn

from mambaquant_ext import Rotation, load, quantize_, recipe, save
from mambaquant_ext.model.adapters import adapter, adapter_for, adapter_names
from mambaquant_ext.model.vision.mamba_mixer import MambaMixer
from mambaquant_ext.model.vision.unet import MambaUNet, Placement, UNetConfig
from mambaquant_ext.model.vision.vmamba import SS2D
from mambaquant_ext.run.swap import QuantCalledBlock
from stages.vision import quantizing
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR, assert_equal

# The last stage has 8 voxels and 12 channels: with Placement.ENCODER its tokens are channels.
SIZES = {"features": (4, 8, 12), "image_channels": 2, "classes": 3, "dstate": 4}
IMAGE = (8, 8, 8)
NAMES = {
    Placement.BOTTLENECK: ["mamba_layer.mamba"],
    Placement.ENCODER: [f"encoder.mamba_layers.{stage}.mamba" for stage in range(3)],
    Placement.MIM: [f"mae.blocks.{block}.mamba" for block in range(2)],
}
RECIPE = recipe("w8a8")


@cache
def unet(placement):
    config = UNetConfig(**SIZES, image_size=IMAGE, placement=placement)
    return quantizing.uneven_model(MambaUNet, config)


@cache
def volumes(count=2, seed=3):
    return quantizing.random_batches((2, 2, *IMAGE), count, seed)


@pytest.mark.parametrize("placement", Placement)
def test_plain_weights_are_the_unet(placement):
    quantizing.assert_stand_ins_equal(unet(placement), volumes(1, 5)[0])


@pytest.mark.parametrize(
    ("placement", "name"),
    [
        *((Placement.ENCODER, name) for name in quantizing.RECIPES),
        (Placement.BOTTLENECK, "w8a8"),
        (Placement.MIM, "w8a8"),
    ],
)
def test_transforms_keep_the_function(placement, name):
    error = quantizing.preserved(unet(placement), volumes(), quantizing.RECIPES[name])
    assert error < RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("placement", Placement)
def test_quantizing_swaps_the_mixers_of_a_unet_alone(placement):
    quantizing.assert_swaps_exactly(unet(placement), volumes(), NAMES[placement])


@pytest.mark.parametrize("placement", Placement)
def test_kernels_compute_what_the_emulation_does(placement):
    found = quantizing.assert_integer_equals_emulated(unet(placement), volumes(8), volumes(1, 5)[0])
    assert found >= MODEL_SQNR_DB[f"unet {placement.value}"]


@pytest.mark.parametrize("placement", Placement)
def test_checkpoints_of_a_unet_give_the_same_bits(placement, tmp_path):
    quantizing.assert_survives_saving(unet(placement), volumes(), volumes(1, 5)[0], tmp_path)


# Models of users


class StrictMixer(MambaMixer):
    """mamba_ssm's signature."""

    def forward(self, hidden_states, inference_params=None):
        assert inference_params is None
        return super().forward(hidden_states)


class Residual(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mixer = mixer

    def forward(self, x, inference_params=None):
        return x + self.mixer(self.norm(x), inference_params=inference_params)


class Hybrid(nn.Module):
    """Attention between mixers, one of which two blocks share; an image mixer at the end; two outputs."""

    def __init__(self, hidden=16):
        super().__init__()
        self.embed = nn.Linear(6, hidden)
        first, shared = StrictMixer(hidden, 4), StrictMixer(hidden, 4)
        self.stack = nn.ModuleList([Residual(first), Residual(shared), Residual(shared)])
        self.attention = nn.MultiheadAttention(hidden, 2, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.image = SS2D(
            hidden=hidden,
            dim=16,
            dt_rank=2,
            dstate=4,
            conv_width=3,
            has_conv_bias=True,
            has_gate=True,
        )

    def forward(self, tokens):
        x = self.embed(tokens)
        for index, block in enumerate(self.stack):
            x = block(x)
            if index == 0:
                x = x + self.attention(x, x, x, need_weights=False)[0]
        image = self.image(self.norm(x).unflatten(1, (4, -1)))
        return x, image.permute(0, 3, 1, 2)


HYBRID_NAMES = ["image", "stack.0.mixer", "stack.1.mixer", "stack.2.mixer"]


@cache
def hybrid():
    return quantizing.uneven_model(lambda _: Hybrid(), None)


@cache
def sequences(count=2, seed=3):
    return quantizing.random_batches((2, 24, 6), count, seed)


def test_mixers_of_a_hybrid_are_found_once_an_owner():
    assert adapter_for(hybrid()).name == "mixers"
    quantizing.assert_stand_ins_equal(hybrid(), sequences(1, 5)[0])
    found, _ = quantizing.quantized(hybrid(), sequences(), quantizing.PLAIN)
    quantizing.assert_swaps_exactly(hybrid(), sequences(), HYBRID_NAMES)
    # Blocks that shared a mixer have ranges of their own.
    first, second = (found.stack[index].mixer.block.packed for index in (1, 2))
    assert_equal(first.in_proj, second.in_proj)
    assert not torch.equal(first.in_scale, second.in_scale)


def test_another_name_of_the_same_owner_is_no_other_block():
    """U-Mamba's decoder holds the encoder, too."""
    model = Hybrid()
    model.decoder = nn.ModuleDict({"encoder": model.stack})
    assert [site.name for site in adapter_for(model).sites(model)] == HYBRID_NAMES
    quantize_(model, sequences(), RECIPE)
    assert type(model.decoder["encoder"][1].mixer) is QuantCalledBlock


@pytest.mark.parametrize("name", quantizing.RECIPES)
def test_transforms_keep_the_function_of_a_hybrid(name):
    error = quantizing.preserved(hybrid(), sequences(), quantizing.RECIPES[name])
    assert error < RELATIVE_ERROR[torch.float64]


def test_kernels_of_a_hybrid_compute_what_the_emulation_does():
    found = quantizing.assert_integer_equals_emulated(hybrid(), sequences(8), sequences(1, 5)[0])
    assert found >= MODEL_SQNR_DB["hybrid"]


def test_a_sequence_does_not_depend_on_its_batch():
    model, _ = quantizing.quantized(hybrid(), sequences())
    quantizing.assert_rows_stand_alone(model.stack[0].mixer, torch.randn(3, 9, 16))
    quantizing.assert_rows_stand_alone(model.image, torch.randn(3, 4, 5, 16))


def test_a_checkpoint_is_loaded_into_a_model_of_the_same_class(tmp_path):
    model, packed = quantizing.quantized(hybrid(), sequences())
    save(packed, adapter("mixers").config(model), tmp_path)
    with pytest.raises(
        NotImplementedError, match=r"'mixers' cannot build a model: .*load\(folder, model="
    ):
        load(tmp_path)
    blank = Hybrid()
    loaded = load(tmp_path, model=blank)
    assert loaded is blank
    batch = sequences(1, 5)[0]
    for actual, expected in zip(
        quantizing.outputs(loaded, batch), quantizing.outputs(model, batch), strict=True
    ):
        assert_equal(actual, expected)


def test_a_checkpoint_is_not_loaded_into_a_model_of_other_blocks(tmp_path):
    _, packed = quantizing.quantized(hybrid(), sequences())
    save(packed, {}, tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a model with Mamba blocks image, stack\.0\.mixer"
    ):
        load(tmp_path, model=unet(Placement.BOTTLENECK))


def test_a_quantized_mixer_takes_no_cache():
    model, _ = quantizing.quantized(hybrid(), sequences())
    mixer, x = model.stack[0].mixer, torch.randn(1, 5, 16)
    assert type(mixer) is QuantCalledBlock
    assert_equal(mixer(x, inference_params=None), mixer(x))
    assert_equal(mixer(hidden_states=x), mixer(x, None))
    with pytest.raises(ValueError, match=r"expected hidden_states alone.*got inference_params"):
        mixer(x, inference_params=object())
    with pytest.raises(ValueError, match=r"expected hidden_states alone.*got argument 2"):
        mixer(x, object())


def test_the_general_adapter_is_asked_last():
    assert adapter_names()[0] == "mixers"
    assert adapter("mixers").matches(unet(Placement.MIM))
    assert adapter_for(unet(Placement.MIM)).name == "mamba_unet"


def test_a_model_without_mixers_is_refused():
    with pytest.raises(TypeError, match=r"expected a model of a known family.*got Sequential"):
        quantize_(nn.Sequential(nn.Linear(3, 3)), [torch.randn(2, 3)], RECIPE)


@pytest.mark.parametrize(
    ("hidden", "expand", "switches", "names"),
    [
        # Hidden widths of channel tokens are numbers of voxels: 18 has no Hadamard matrix, 36 has one.
        (18, 2, {}, "residual_rotation"),
        (18, 2, {"residual_rotation": Rotation.NONE}, None),
        (18, 1, {"residual_rotation": Rotation.NONE}, "out_rotation"),
        (18, 1, {"residual_rotation": Rotation.NONE, "out_rotation": False}, None),
    ],
)
def test_a_width_without_hadamard_matrix_names_block_and_switch(hidden, expand, switches, names):
    model = nn.Sequential(nn.Identity(), StrictMixer(hidden, 4, expand=expand)).eval()
    batches = [torch.randn(2, 40, hidden)]
    if names is None:
        quantize_(model, batches, RECIPE.replace(**switches))
        assert type(model[1]) is QuantCalledBlock
        return
    with pytest.raises(
        ValueError, match=rf"^1: hadamard: .* got 18; turn the recipe's {names} off"
    ):
        quantize_(model, batches, RECIPE.replace(**switches))
    assert type(model[1]) is StrictMixer


def test_a_dstate_without_hadamard_matrix_names_block_and_switch():
    model = nn.Sequential(nn.Identity(), StrictMixer(16, 6)).eval()
    with pytest.raises(
        ValueError, match=r"^1: hadamard: .* got 6; turn the recipe's state_rotation off"
    ):
        quantize_(model, [torch.randn(2, 40, 16)], RECIPE)
