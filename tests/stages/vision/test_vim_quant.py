"""A quantized Vim: every type of its blocks, both norms, all places of the class token."""

import copy
import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from mambaquant_ext import CheckpointError, Fidelity, load, load_runner, ops, prepack, recipe, save
from mambaquant_ext.artifacts import load_packed, save_packed
from mambaquant_ext.images import load_images, normalise
from mambaquant_ext.model.adapters import adapter_for
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.model.vision import BimambaType, VimConfig, VisionMamba
from mambaquant_ext.routes import FORWARD, ScanRoute
from stages.vision import quantizing
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR, assert_equal, assert_relative, sqnr_db

TRAINED = Path(__file__).parents[2] / "data" / "vim-fashion-mnist"
SMALL = {
    "img_size": 16,
    "channels": 2,
    "patch_size": 4,
    "stride": 4,
    "embed_dim": 24,
    "depth": 3,
    "num_classes": 7,
    "d_state": 8,
    "dt_rank": 4,
    "mean": (0.5, 0.4),
    "std": (0.2, 0.3),
}
CONFIGS = {
    "v2": {},
    "v2 sum": {"if_devide_out": False},
    "v2, LayerNorm": {"rms_norm": False},
    "v2, biases": {"in_proj_bias": True, "out_proj_bias": True},
    "v2, class token first": {"use_middle_cls_token": False},
    "v2, pooled": {"if_cls_token": False, "use_middle_cls_token": False},
    "v1": {"bimamba_type": BimambaType.V1},
    "v1, LayerNorm": {"bimamba_type": BimambaType.V1, "rms_norm": False},
    "forward only": {"bimamba_type": BimambaType.NONE},
}
configs = pytest.mark.parametrize("name", CONFIGS)


@cache
def model_of(name):
    """None of the tests changes it."""
    return quantizing.uneven_model(VisionMamba, VimConfig(**{**SMALL, **CONFIGS[name]}))


@cache
def batches():
    return quantizing.random_batches((16, 2, 16, 16), 2)


@cache
def one_more_batch():
    return quantizing.random_batches((16, 2, 16, 16), 1, seed=9)[0]


@configs
def test_the_adapter_describes_the_model(name):
    quantizing.assert_stand_ins_equal(model_of(name), one_more_batch())


@configs
def test_the_whole_method_keeps_the_function(name):
    error = quantizing.preserved(model_of(name), batches(), recipe("w8a8"))
    assert error < RELATIVE_ERROR[torch.float64]


@pytest.mark.parametrize("switches", quantizing.RECIPES)
@pytest.mark.parametrize("name", ["v2", "v1, LayerNorm"])
def test_each_transform_alone_keeps_the_function(name, switches):
    error = quantizing.preserved(model_of(name), batches(), quantizing.RECIPES[switches])
    assert error < RELATIVE_ERROR[torch.float64]


def test_p10_one_gate_scale_serves_both_directions_and_their_branches_differ():
    run, _ = quantizing.transformed(model_of("v2"), batches(), recipe("w8a8"))
    for layer in run.layers:
        assert layer.routes == (FORWARD, ScanRoute(reverse=True, branch=1))
        assert len(layer.convs) == len(layer.branches) == 2
        assert layer.gate_scale.shape == (layer.dim,)
        assert not torch.equal(layer.branches[0].dt, layer.branches[1].dt)
        assert layer.has_out_rotation
        assert layer.has_state_rotation


def stream_behind_the_first_block(model):
    """(batch, seqlen, hidden), of a float64 model."""
    seen = []
    handle = model.layers[1].register_forward_pre_hook(
        lambda _module, args: seen.append(sum(part for part in args if part is not None))
    )
    quantizing.outputs(model, one_more_batch().double())
    handle.remove()
    return seen[0]


def test_p6_the_residual_stream_is_rotated_and_centred_for_a_layernorm():
    """The stream behind the first block is x P R, P taking the mean out; with an RMSNorm it is x R."""
    for name in ("v2", "v2, LayerNorm"):
        model = model_of(name)
        run, _ = quantizing.transformed(model, batches(), recipe("w8a8"))
        float64 = quantizing.exact(model)
        plain, rotated = (stream_behind_the_first_block(m) for m in (float64, run.model))
        if name == "v2, LayerNorm":
            plain = plain - plain.mean(-1, keepdim=True)
        # An orthogonal map keeps every product of two tokens.
        assert_relative(rotated @ rotated.mT, plain @ plain.mT)
        assert (rotated - plain).abs().max() > 0.1


@configs
def test_quantizing_swaps_the_blocks_and_the_head_alone(name):
    model = model_of(name)
    names = [f"layers.{index}" for index in range(3)]
    quantizing.assert_swaps_exactly(model, batches(), names, "head")


@configs
def test_kernels_agree_with_their_emulation_and_are_close_to_float(name):
    found = quantizing.assert_integer_equals_emulated(model_of(name), batches(), one_more_batch())
    assert found > MODEL_SQNR_DB[f"vim {name}"]


@pytest.mark.parametrize("name", ["v2", "v1, LayerNorm"])
def test_kernels_of_every_isa_agree_with_the_emulation(name, isa):
    quantizing.assert_integer_equals_emulated(model_of(name), batches(), one_more_batch()[:4])


@configs
def test_a_quantized_model_survives_saving(name, tmp_path):
    quantizing.assert_survives_saving(model_of(name), batches(), one_more_batch()[:4], tmp_path)


def test_an_image_has_the_same_bits_alone_and_in_a_batch(isa):
    model, _ = quantizing.quantized(model_of("v2"), batches())
    quantizing.assert_rows_stand_alone(model, one_more_batch()[:3])


def test_the_class_token_has_a_range_of_its_own():
    """Rounded with its own scale, and only where the recipe says so."""
    model = copy.deepcopy(model_of("v2"))
    model.cls_token.mul_(30)
    apart, packed = quantizing.quantized(model, batches())
    together, plain = quantizing.quantized(
        model, batches(), recipe("w8a8").replace(separate_class_token=False)
    )
    assert all(block.layout.class_token == 8 for block in packed.blocks)
    assert all(block.class_out_scale is None for block in plain.blocks)
    assert any(not torch.equal(b.class_out_scale, b.out_scale) for b in packed.blocks)
    batch = one_more_batch()
    wanted = quantizing.flat(quantizing.outputs(model, batch))
    noise = [
        sqnr_db(quantizing.flat(quantizing.outputs(found, batch)), wanted)
        for found in (apart, together)
    ]
    assert min(noise) > MODEL_SQNR_DB["vim large class token"]


def test_a_checkpoint_without_one_of_the_surrounding_tensors_is_refused(tmp_path):
    model = model_of("v2")
    _, packed = quantizing.quantized(model, batches())
    short = {name: t for name, t in packed.surroundings.items() if name != "pos_embed"}
    save(dataclasses.replace(packed, surroundings=short), model.config, tmp_path)
    for given in (None, model):
        with pytest.raises(CheckpointError, match=r"surroundings\.pos_embed: missing"):
            load(tmp_path, model=given)


def spoiled(folder, **changes):
    path = folder / "mambaquant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = model_of("v2")
    _, packed = quantizing.quantized(model, batches())
    save(packed, model.config, folder)
    return folder


@pytest.mark.parametrize("gives_model", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter": "nobody"},
            r"mambaquant\.json: adapter: expected one of .*vim.*, got 'nobody'",
        ),
        ({"linear": "a.b"}, r"mambaquant\.json: linear: expected null or 'head', got 'a\.b'"),
        ({"linear": "patch_embed.proj"}, "linear: expected null or 'head', got 'patch_embed.proj'"),
    ],
)
def test_a_name_that_no_adapter_gives_is_refused(changes, message, gives_model, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    spoiled(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder, model=model_of("v2") if gives_model else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_surrounding_tensor_of_another_dtype_is_refused(dtype, saved, tmp_path):
    packed = load_packed(saved)
    surroundings = {**packed.surroundings, "pos_embed": packed.surroundings["pos_embed"].to(dtype)}
    save(dataclasses.replace(packed, surroundings=surroundings), model_of("v2").config, tmp_path)
    with pytest.raises(ValueError, match=rf"pos_embed: expected torch.float32, got {dtype}"):
        load(tmp_path)


def test_packed_image_holds_every_matrix_of_all_routes_and_the_head(
    saved, tmp_path, isa, monkeypatch
):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    plain = quantizing.flat(quantizing.outputs(load(folder), batches()[0]))
    prepack(folder)
    monkeypatch.setattr(ops, "pack_gemm_weight", None)
    for verify in (None, True):
        loaded = load(folder, verify=verify)
        assert_equal(quantizing.flat(quantizing.outputs(loaded, batches()[0])), plain)


def test_no_language_runner_for_a_vision_model(saved):
    with pytest.raises(ValueError, match="expected a language model, got one of adapter 'vim'"):
        load_runner(saved)


def test_sizes_that_no_tensor_has_are_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expand": 10**30}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_a_surrounding_tensor_may_have_any_values(saved, tmp_path):
    """Those of a mask, or of a factor called scale: no kernel reads them."""
    packed = load_packed(saved)
    odd = torch.tensor([-1.0, 0.0, -torch.inf])
    surroundings = {**packed.surroundings, "layer_scale": odd, "bias_scale": odd.to(torch.int8)}
    save_packed(dataclasses.replace(packed, surroundings=surroundings), tmp_path)
    assert_equal(load_packed(tmp_path).surroundings["layer_scale"], odd)


@pytest.fixture(scope="module")
def trained():
    model = load_float_model(TRAINED).requires_grad_(False)
    config = model.config

    def prepared(file, count):
        images = load_images(TRAINED / file)[:count]
        return normalise(images.images, config.mean, config.std), images.labels

    calibration, _ = prepared("calib_256.npz", 32)
    return model, calibration.split(16), *prepared("test_2000.npz", 24)


def test_the_trained_model_keeps_its_predictions(trained):
    model, calibration, images, labels = trained
    integer, packed = quantizing.quantized(model, calibration)
    emulated, _ = quantizing.quantized(model, calibration, fidelity=Fidelity.EMULATED)
    with torch.no_grad():
        logits = [runner(images) for runner in (model, integer, emulated)]
    wanted, found, rounded = (scores.argmax(1) for scores in logits)
    assert (wanted == labels).float().mean() > 0.85
    assert_equal(found, rounded)
    # One image's two best classes are 0.1 apart; int8 moves a logit by up to 0.5.
    best, second = logits[0].topk(2).values.unbind(1)
    is_clear = best - second > 0.5
    assert is_clear.sum() == len(images) - 1
    assert_equal(found[is_clear], wanted[is_clear])
    assert sqnr_db(logits[1], logits[0]) > MODEL_SQNR_DB["trained vim"]
    assert adapter_for(model).name == packed.adapter == "vim"


def test_transforms_of_the_trained_model_keep_its_logits(trained):
    model, calibration, images, _ = trained
    run, _ = quantizing.transformed(model, calibration, recipe("w8a8"))
    assert quantizing.error_of(run.model, model, images[:4]) < RELATIVE_ERROR[torch.float64]


def test_a_model_that_is_not_on_the_cpu_is_refused():
    with torch.device("meta"):
        model = VisionMamba(VimConfig(**SMALL))
    with pytest.raises(
        ValueError, match=r"(patch_embed|cls_token).*expected a model on the CPU, got meta"
    ):
        quantizing.quantize_(model, batches(), recipe("w8a8"))
