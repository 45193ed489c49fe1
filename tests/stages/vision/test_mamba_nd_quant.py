"""Quantized Mamba-ND: what its adapter says of it, that transforms keep it, and that it runs on integers."""

import copy
import dataclasses
from functools import cache

import pytest
import torch

from mambaquant_ext import Fidelity, Rotation, recipe
from mambaquant_ext.artifacts import NormKind, Skip
from mambaquant_ext.model.adapters import adapter_for, adapter_of_config
from mambaquant_ext.model.sites import FloatBlock
from mambaquant_ext.model.vision import Factorization, MambaND, MambaNDConfig, MambaNDEncoder
from mambaquant_ext.transform import stream_rotation
from stages.vision.quantizing import (
    RECIPES,
    assert_integer_equals_emulated,
    assert_rows_stand_alone,
    assert_stand_ins_equal,
    assert_survives_saving,
    assert_swaps_exactly,
    error_of,
    preserved,
    quantized,
    random_batches,
    transformed,
    uneven_model,
)
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR, assert_equal, sqnr_db

COMMON = {
    "embed_dim": 48,
    "depth": 4,
    "num_classes": 7,
    "channels": 2,
    "mean": (0.4, 0.5),
    "std": (0.2, 0.3),
}
# Six by four patches, three by two after layer 1.
IMAGE = MambaNDConfig(
    input_size=(12, 8),
    patch_size=(2, 2),
    downsample=(1,),
    final_norm=True,
    pooled_norm=True,
    **COMMON,
)
# Three frames of four by two patches.
VIDEO = MambaNDConfig(input_size=(6, 8, 4), patch_size=(2, 2, 2), **COMMON)
CONFIGS = {
    "image": IMAGE,
    "video": VIDEO,
    "encoder": dataclasses.replace(VIDEO, num_classes=0, out_indices=(0, 2)),
    # Layers 4 and 5 walk the third order, in which HW_T covers all tokens at once.
    "hw_t": dataclasses.replace(VIDEO, factorization=Factorization.HW_T, depth=6),
    "h_w_t": dataclasses.replace(VIDEO, factorization=Factorization.H_W_T),
}
HEADS = {"image": "head.fc", "encoder": None}
names = pytest.mark.parametrize("name", CONFIGS)


@cache
def model(name):
    """None of the tests changes it."""
    return uneven_model(MambaNDEncoder if name == "encoder" else MambaND, CONFIGS[name])


@cache
def batches(name):
    return random_batches((4, 2, *CONFIGS[name].input_size), 3)


@cache
def unseen(name, count=3):
    return random_batches((count, 2, *CONFIGS[name].input_size), 1, seed=9)[0]


def block_names(name):
    return (
        [f"layers.{n}" for n in range(3)]
        if name == "encoder"
        else [f"backbone.layers.{n}" for n in range(CONFIGS[name].depth)]
    )


@names
def test_stand_ins_are_the_blocks(name):
    assert_stand_ins_equal(model(name), batches(name)[0])


# Every transform where streams are rotated, with a merging between, and where they are not; all at once elsewhere.
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *[
            pytest.param(n, r, id=f"{n}-{key}")
            for n in ("image", "encoder")
            for key, r in RECIPES.items()
        ],
        *[pytest.param(n, RECIPES["w8a8"], id=f"{n}-w8a8") for n in ("video", "hw_t", "h_w_t")],
    ],
)
def test_transforms_keep_the_function(name, recipe):
    assert preserved(model(name), batches(name), recipe) <= RELATIVE_ERROR[torch.float64]


def test_a_layer_that_merges_and_is_the_last_is_kept_too():
    config = dataclasses.replace(IMAGE, downsample=(1, 3), input_size=(16, 8))
    float_model = uneven_model(MambaND, config)
    found = preserved(float_model, random_batches((4, 2, 16, 8)), recipe("w8a8"))
    assert found <= RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("name", ["image", "video"])
def test_a_skip_that_is_not_centred_is_another_function(name):
    """A LayerNorm takes the mean out of the skip, too; the RMSNorm in its place does not (section 2.3.3)."""
    rotated = recipe("rtn").replace(residual_rotation=Rotation.KLT)
    run, moments = transformed(model(name), batches(name), rotated)
    matrix = stream_rotation(moments, rotated)
    config = CONFIGS[name]
    centred = [n for n in range(config.depth - 1) if n not in config.downsample]
    changed = copy.deepcopy(run.model)
    for index in centred:
        block = changed.backbone.layers[index]
        assert isinstance(block, FloatBlock)
        gamma = model(name).backbone.layers[index].norm.weight.double()
        block.weights = block.weights.replace(skip_weight=matrix.T @ torch.diag(gamma) @ matrix)
    expected, batch = model(name), batches(name)[0]
    assert error_of(run.model, expected, batch) <= RELATIVE_ERROR[torch.float64]
    assert error_of(changed, expected, batch) > 1e-3


@pytest.mark.parametrize("name", ["image", "video", "hw_t"])
def test_a_klt_rotates_the_stream_of_a_classifier_as_a_whole(name):
    rotated, plain = recipe("rtn").replace(residual_rotation=Rotation.KLT), recipe("rtn")
    run, _ = transformed(model(name), batches(name), rotated)
    before, _ = transformed(model(name), batches(name), plain)
    for layer in run.layers:
        assert not layer.has_in_rotation
        assert layer.norm.kind is NormKind.RMS
        assert layer.skip_weight.shape == (48, 48)
    old, new = (dict(r.model.named_parameters()) for r in (before, run))
    written = {n for n in old if "patch_embed" in n or "pos_embed" in n or "reduction" in n}
    assert len(written) == 3 + len(CONFIGS[name].downsample)
    for parameter, tensor in old.items():
        assert torch.equal(tensor, new[parameter]) == (parameter not in written), parameter


@pytest.mark.parametrize(("name", "preset"), [("encoder", "w8a8"), ("image", "quarot")])
def test_blocks_of_an_encoder_or_without_klt_rotate_their_own_input(name, preset):
    """A skip stays one factor a channel: a row of it depends on no other row."""
    rotated, plain = recipe(preset), recipe("rtn")
    run, _ = transformed(model(name), batches(name), rotated)
    before, _ = transformed(model(name), batches(name), plain)
    for layer in run.layers:
        assert layer.has_in_rotation
        assert (layer.norm.kind, layer.skip) == (NormKind.LAYER, Skip.NORMALISED)
        assert layer.skip_weight.shape == (48,)
    for parameter, tensor in before.model.named_parameters():
        assert_equal(dict(run.model.named_parameters())[parameter], tensor)


@names
def test_blocks_and_head_are_swapped_and_nothing_else(name):
    head = HEADS.get(name, "cls_head.fc_cls")
    assert_swaps_exactly(model(name), batches(name), block_names(name), head)


def test_the_merging_is_called_where_it_was():
    found, _ = quantized(model("image"), batches("image"), recipe("rtn"))
    kept = found.backbone.layers[1].down_sample_layer
    expected = model("image").backbone.layers[1].down_sample_layer
    assert type(kept) is type(expected)
    assert_equal(kept.reduction.weight, expected.reduction.weight)


@names
def test_integers_are_their_emulation_and_close_to_float(name):
    found = assert_integer_equals_emulated(model(name), batches(name), unseen(name, 12))
    assert found >= MODEL_SQNR_DB[f"mamba-nd {name}"]


@names
def test_a_saved_model_is_the_model(name, tmp_path):
    assert_survives_saving(model(name), batches(name), unseen(name), tmp_path)


@names
def test_a_sample_does_not_depend_on_its_batch(name):
    found, _ = quantized(model(name), batches(name))
    assert_rows_stand_alone(found, unseen(name))


@pytest.mark.parametrize("name", ["image", "encoder"])
def test_a_sample_does_not_depend_on_its_batch_on_any_isa(name, isa):
    found, _ = quantized(model(name), batches(name))
    assert_rows_stand_alone(found, unseen(name))


@pytest.mark.parametrize("fidelity", Fidelity)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_block_gives_back_the_dtype_of_the_model_around_it(dtype, fidelity):
    found, _ = quantized(model("image"), batches("image"), fidelity=fidelity)
    tokens = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    block = found.backbone.layers[0]
    assert_equal(block(tokens), block(tokens.float()).to(dtype))
    moved = copy.deepcopy(found).to(dtype)
    actual, expected = moved(unseen("image").to(dtype)), found(unseen("image"))
    assert sqnr_db(actual.float(), expected) >= MODEL_SQNR_DB["mamba-nd image"]


def test_blocks_and_head_take_any_strides(generator):
    """As the float modules in their place do."""
    found, _ = quantized(model("image"), batches("image"))
    tokens = torch.randn(2, 24, 48, generator=generator)
    transposed = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    for module in (found.backbone.layers[0], found.head.fc):
        for sample in (slice(None), slice(1)):
            assert_equal(module(transposed[sample]), module(tokens[sample]))


@names
def test_the_configuration_names_its_adapter(name):
    adapter = adapter_for(model(name))
    config = adapter.config(model(name))
    assert adapter_of_config(config) is adapter
    assert adapter.build(config).config == CONFIGS[name]
