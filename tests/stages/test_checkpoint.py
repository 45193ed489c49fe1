"""Checkpoints: equal bits after loading, and CheckpointError, never anything else, for whatever is not a checkpoint."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mambaquant_ext
from mambaquant_ext import CheckpointError, Fidelity, Rotation, load, quantize_, recipe, save
from mambaquant_ext.artifacts import files, load_packed, save_packed
from stages import hf_models
from stages.hf_models import logits, tiny_model, tokens
from tolerances import assert_equal

TENSORS, METADATA, CONFIG = "model.safetensors", "mambaquant.json", "config.json"
IDS = tokens(2, 9)


@cache
def quantized(preset="w8a8", **switches):
    model = tiny_model()
    config = tiny_model().config
    packed = quantize_(model, hf_models.calibration(), recipe(preset).replace(**switches), seed=7)
    return model, packed, config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    _, packed, config = quantized()
    save(packed, config, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# Round trip


@pytest.mark.parametrize(
    ("preset", "switches"),
    [
        ("w8a8", {}),
        ("rtn", {}),
        ("smoothquant", {}),
        ("quarot", {}),
        ("w8a8", {"quantize_head": False}),
        ("w8a8", {"quantize_embedding": False}),
        ("w8a8", {"state_rotation": False, "quantize_readout": False}),
        ("w8a8", {"out_rotation": False}),
    ],
    ids=str,
)
def test_loaded_model_computes_the_bits_of_the_saved_one(preset, switches, tmp_path, isa):
    _, packed, config = quantized(preset, **switches)
    save(packed, config, tmp_path)
    model = load(tmp_path)
    expected = tiny_model()
    mambaquant_ext.run.swap.swap_(expected, packed, Fidelity.INTEGER)
    assert_equal(logits(model, IDS), logits(expected, IDS))
    loaded = load_packed(tmp_path)
    assert loaded.recipe == packed.recipe
    assert loaded.provenance == packed.provenance
    assert loaded.provenance["seed"] == 7


def test_fewer_than_8_bits_load_emulated_only(tmp_path):
    model = tiny_model()
    packed = quantize_(
        model, hf_models.calibration(), recipe("w8a8").replace(weight_bits=4), Fidelity.EMULATED
    )
    save(packed, tiny_model().config, tmp_path)
    assert_equal(logits(load(tmp_path, Fidelity.EMULATED), IDS), logits(model, IDS))
    with pytest.raises(ValueError, match="expected 8 bits"):
        load(tmp_path)


def test_saving_over_the_folder_that_was_loaded_keeps_the_model(folder):
    """Tensors of a loaded model are mapped from the file that is replaced."""
    expected = logits(load(folder), IDS)
    packed = load_packed(folder)
    save(packed, quantized()[2], folder)
    assert_equal(logits(load(folder), IDS), expected)


def test_loaded_model_generates(folder):
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    assert_equal(load(folder).generate(IDS, **options), quantized()[0].generate(IDS, **options))


def test_tokenizer_files_are_copied_and_other_files_are_not(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "pytorch_model.bin", "notes.txt"):
        (source / name).write_text("{}")
    _, packed, config = quantized()
    save(packed, config, out, source)
    assert {p.name for p in out.iterdir()} == {
        TENSORS,
        METADATA,
        CONFIG,
        "tokenizer.json",
        "generation_config.json",
    }


def test_config_of_the_saved_model_is_left_alone(tmp_path):
    config = tiny_model().config
    before = config.to_dict()
    save(quantized()[1], config, tmp_path)
    assert config.to_dict() == before


# Interruption


@pytest.mark.parametrize("exception", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["save_file", "sha256", "json.dumps", "replace", "copyfile"])
def test_interrupted_save_leaves_nothing_that_loads(step, exception, folder, monkeypatch):
    """Also where a good checkpoint stood before: it must not load with half of another one's files."""
    targets = {
        "save_file": (files, "save_file"),
        "sha256": (files, "sha256"),
        "json.dumps": (files.json, "dumps"),
        "replace": (Path, "replace"),
        "copyfile": (mambaquant_ext.checkpoint.shutil, "copyfile"),
    }

    def fail(*_args, **_kwargs):
        raise exception

    source = folder.parent / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(*targets[step], fail)
        with pytest.raises(type(exception)):
            save(quantized("rtn")[1], quantized()[2], folder, source)
    with pytest.raises(CheckpointError):
        load(folder)
    assert {p.name for p in folder.iterdir()} <= {
        TENSORS,
        CONFIG,
        "tokenizer.json",
    }  # no temporary files


# Damage


def refused(folder, *named, verify=True):
    """load() raises CheckpointError and its message holds each of `named`."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, verify=verify)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    for text in named:
        assert text in message, f"{text!r} is not in {message!r}"


@pytest.mark.parametrize("name", [TENSORS, METADATA, CONFIG])
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"3"], ids=repr)
def test_foreign_content_is_refused(name, content, folder):
    (folder / name).write_bytes(content)
    refused(folder, name, verify=False)


@pytest.mark.parametrize("name", [TENSORS, METADATA, CONFIG])
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_missing_file_is_refused(name, kind, folder):
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    refused(folder, name)


def test_folder_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "nowhere", METADATA)


def test_float_model_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    refused(tmp_path, METADATA, "mambaquant quantize")


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_tensors_are_refused(verify, folder):
    path = folder / TENSORS
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = {*range(0, 10), header - 1, header, header + 1, len(content) - 1}
    offsets |= {len(content) * i // 20 for i in range(20)}
    for offset in sorted(offsets):
        path.write_bytes(content[:offset])
        refused(folder, TENSORS, verify=verify)


def test_any_flipped_byte_is_refused(folder):
    path = folder / TENSORS
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, len(content), (30,), generator=generator).tolist()
    for offset in [*range(0, 8), *offsets]:
        changed = bytearray(content)
        changed[offset] ^= 0x10
        path.write_bytes(changed)
        refused(folder, TENSORS)


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def leaves(values, above=()):
    """Paths of every field of a JSON object, and of the objects in its lists."""
    for name, value in values.items():
        path = (*above, name)
        yield path
        if isinstance(value, dict) and name != "calibration":
            yield from leaves(value, path)
        if isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from leaves(item, (*path, index))


def put(values, path, value):
    for name in path[:-1]:
        values = values[name]
    if value is None:
        del values[path[-1]]
    else:
        values[path[-1]] = value


def test_metadata_without_any_one_field_are_refused(folder):
    path = folder / METADATA
    original = path.read_text()
    fields = list(leaves(json.loads(original)))
    assert len(fields) > 100
    for field in fields:
        path.write_text(original)
        rewrite(path, lambda values, field=field: put(values, field, None))
        refused(folder, METADATA, field[-1])


@pytest.mark.parametrize("value", ["x", [], {}, -3, 2.5, 1e400, True, 10**30], ids=repr)
def test_metadata_with_a_wrong_value_in_any_field_are_refused(value, folder):
    """Wrong means: of another type, or another value of a field that decides what is computed."""
    path = folder / METADATA
    original = path.read_text()
    free = {"calibration", "name", "tensors_sha256", "percentile", "observer", "granularity"}
    for field in leaves(json.loads(original)):
        now = json.loads(original)
        for name in field:
            now = now[name]
        is_same_type = type(now) is type(value)
        if now == value or (is_same_type and (field[-1] in free or field[0] == "recipe")):
            continue
        if field[-1] == "percentile" and value is True:
            continue
        path.write_text(original)
        rewrite(path, lambda values, field=field: put(values, field, value))
        refused(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("layers", 0, "has_out_rotation"), False),
        (("layers", 1, "has_state_rotation"), False),
        (("layers", 0, "quantize_readout"), False),
        (("layers", 1, "weight_bits"), 4),
        (("layers", 0, "activation_bits"), 4),
        (("layers", 1, "gate_bits"), 7),
        (("layers", 0, "norm_eps"), -1e-5),
        (("layers", 1, "norm_eps"), float("nan")),
        (("layers", 1, "norm_eps"), 1e-6),
        (("layers", 0, "branches", 0, "dstate"), 8),
        (("layers", 0, "hidden"), 0),
        (("layers", 0, "merge"), "gated"),
        (("layers", 1, "skip"), "none"),
        (("layers", 0, "norm"), "layer"),
        (("layers", 0, "convs", 0, "along_route"), False),
        (("layers", 0, "routes", 0, "order", "name"), "spiral"),
        (("layers", 0, "routes", 0, "order", "name"), "unknown"),
        (("layers", 0, "routes"), []),
        (("layers", 0, "convs"), []),
        (("layers",), None),
        (("layers", 1), None),
        (("names",), ["backbone.layers.0"]),
        (("names", 1), 1),
        (("adapter",), "vim"),
        (("has_head",), False),
        (("linear",), "lm_head"),
        (("recipe", "version"), 1),
        (("recipe", "version"), 3),
        (("recipe", "extra"), 1),
        (("layers", 0, "extra"), 1),
        (("layers", 1, "convs", 0, "extra"), 1),
        (("layers", 0, "routes", 0, "order", "extra"), 1),
        (("format",), "awq"),
        (("format_version",), True),
        (("format_version",), 1.0),
    ],
    ids=str,
)
def test_metadata_that_contradict_themselves_or_the_tensors_are_refused(field, value, folder):
    rewrite(folder / METADATA, lambda values: put(values, field, value))
    refused(folder, verify=False)


def test_newer_version_says_so(folder):
    rewrite(folder / METADATA, lambda values: put(values, ("format_version",), 3))
    refused(folder, METADATA, "format_version: expected 2, got 3", "newer", "upgrade")


def test_older_version_says_what_to_do(folder):
    """Version 1 told one structure for all blocks, in other fields."""

    def as_before(values):
        values.update(format_version=1, layers=2, block={"hidden": 48}, options={"weight_bits": 8})
        for name in ("adapter", "names", "has_head", "linear"):
            del values[name]

    rewrite(folder / METADATA, as_before)
    refused(folder, METADATA, "format_version: expected 2, got 1", "older", "quantize", "again")


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "hidden_size",
        "state_size",
        "time_step_rank",
        "conv_kernel",
        "vocab_size",
        "num_hidden_layers",
        "intermediate_size",
        "layer_norm_epsilon",
    ],
)
@pytest.mark.parametrize("value", [None, "x", 7, 0.5, []], ids=repr)
def test_edited_config_is_refused(field, value, folder):
    rewrite(folder / CONFIG, lambda values: put(values, (field,), value))
    refused(folder, CONFIG, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", 3), ("use_bias", "maybe"), ("layer_types", 5), ("dtype", "float99")],
)
def test_config_that_transformers_refuses_is_refused(field, value, folder):
    rewrite(folder / CONFIG, lambda values: put(values, (field,), value))
    refused(folder, CONFIG)


@pytest.mark.parametrize(("rank", "dt_rotation"), [(11, "klt"), (12, "klt"), (11, "none")])
def test_a_widened_dt_loads_with_the_rank_of_its_config(rank, dt_rotation, tmp_path):
    """R5 widens a rank of 11 to 12: config.json keeps that of the float model."""
    model = tiny_model(time_step_rank=rank)
    chosen = recipe("w8a8").replace(dt_rotation=Rotation(dt_rotation))
    packed = quantize_(model, hf_models.calibration(), chosen)
    assert packed.blocks[0].layout.branches[0].dt_rank == (12 if dt_rotation == "klt" else 11)
    save(packed, tiny_model(time_step_rank=rank).config, tmp_path)
    assert_equal(logits(load(tmp_path), IDS), logits(model, IDS))
    rewrite(tmp_path / CONFIG, lambda values: put(values, ("time_step_rank",), 13))
    refused(tmp_path, CONFIG, "time_step_rank")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_unreadable_generation_config_is_refused(content, folder):
    (folder / "generation_config.json").write_text(content)
    refused(folder, "generation_config.json")


def respell(folder, change):
    """Changes tensors and records the new checksum: what an edit by hand that hides itself would do."""
    tensors = load_file(folder / TENSORS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "mambaquant"})
    checksum = files.sha256(folder / TENSORS)
    rewrite(folder / METADATA, lambda values: put(values, ("tensors_sha256",), checksum))


def test_changed_weight_is_found_by_its_checksum_alone(folder):
    tensors = load_file(folder / TENSORS)
    tensors["layers.0.in_proj"][0, 0] ^= 1
    save_file(tensors, folder / TENSORS, {"format": "mambaquant"})
    refused(folder, TENSORS, "tensors_sha256")
    load(folder, verify=False)


@pytest.mark.parametrize("damage", ["missing", "wrong shape", "wrong dtype", "empty"])
def test_tensors_that_do_not_fit_are_refused(damage, folder):
    originals = load_file(folder / TENSORS)
    for name in [n for n in originals if n.startswith(("layers.1.", "head."))]:

        def spoil(tensors, name=name):
            tensor = tensors.pop(name)
            if damage == "wrong shape":
                tensors[name] = torch.cat([tensor, tensor[:1]])
            if damage == "empty":
                tensors[name] = tensor[:0].clone()
            if damage == "wrong dtype":
                tensors[name] = tensor.to(torch.float64)

        respell(folder, spoil)
        refused(folder, TENSORS, "head." if name.startswith("head.") else name)
        save_file(originals, folder / TENSORS, {"format": "mambaquant"})


def test_all_of_the_vocabulary_empty_is_refused(folder):
    def spoil(tensors):
        for name in ("embedding", "embedding_scale", "lm_head", "lm_head_scale"):
            tensors[f"head.{name}"] = tensors[f"head.{name}"][:0].clone()

    respell(folder, spoil)
    refused(folder, TENSORS, "head.embedding")


def test_extra_tensor_is_refused(folder):
    respell(folder, lambda tensors: tensors.update({"layers.0.surprise": torch.zeros(1)}))
    refused(folder, TENSORS, "layers.0.surprise")


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, 1e-45], ids=repr)
def test_scales_that_no_kernel_can_use_are_refused(value, folder):
    originals = load_file(folder / TENSORS)
    names = [
        name for name in originals if name.endswith("scale") and not name.startswith("layers.1")
    ]
    assert len(names) == 15
    for name in names:
        respell(folder, lambda tensors, name=name: tensors[name].view(-1)[-1:].fill_(value))
        refused(folder, TENSORS, name, verify=False)
        save_file(originals, folder / TENSORS, {"format": "mambaquant"})


@pytest.mark.parametrize(
    "name",
    ["in_proj", "convs.0.weight", "branches.0.x_proj", "branches.0.dt_proj", "out_proj"],
)
def test_weight_of_minus_128_is_refused(name, folder):
    respell(folder, lambda tensors: tensors[f"layers.0.{name}"].view(-1)[:1].fill_(-128))
    refused(folder, TENSORS, f"layers.0.{name}")


@pytest.mark.parametrize("value", [-129, 128, 2**31 - 1])
def test_zero_point_outside_int8_is_refused(value, folder):
    respell(folder, lambda tensors: tensors["layers.0.convs.0.x_zero_point"][:1].fill_(value))
    refused(folder, TENSORS, "layers.0.convs.0.x_zero_point")


def test_values_that_are_not_finite_are_refused(folder):
    originals = load_file(folder / TENSORS)
    for name in (
        "layers.0.branches.0.A",
        "layers.0.branches.0.D",
        "layers.0.convs.0.bias",
        "head.norm_f",
    ):
        respell(folder, lambda tensors, name=name: tensors[name].view(-1)[:1].fill_(torch.nan))
        refused(folder, TENSORS, name)
        save_file(originals, folder / TENSORS, {"format": "mambaquant"})


def test_half_embedding_that_is_not_finite_is_refused(tmp_path):
    _, packed, config = quantized(quantize_embedding=False)
    save(packed, config, tmp_path)
    respell(tmp_path, lambda tensors: tensors["head.embedding"].view(-1)[:1].fill_(torch.inf))
    refused(tmp_path, TENSORS, "head.embedding")


def test_nothing_is_unpickled():
    """torch.load only ever reads with weights_only, and pickle is nowhere imported."""
    package = Path(mambaquant_ext.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(sources) > 40
    for path, source in sources.items():
        for line in source.splitlines():
            if "torch.load(" in line:
                assert "weights_only=True" in line, f"{path}: {line}"
            assert "import pickle" not in line, path
            assert "torch.save(" not in line, path


def test_save_packed_needs_no_transformers(tmp_path):
    save_packed(quantized()[1], tmp_path / "deep" / "folder")
    assert load_packed(tmp_path / "deep" / "folder").recipe == quantized()[1].recipe
