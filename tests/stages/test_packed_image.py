"""Packed images: equal bits with and without one, nothing read without need, and each kind of damage a clear error."""

import copy
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import mambaquant_ext
from mambaquant_ext import (
    CheckpointError,
    Fidelity,
    forced_isa,
    load,
    load_runner,
    ops,
    prepack,
    quantize_,
    recipe,
    save,
)
from mambaquant_ext._load import gemm_packing
from mambaquant_ext.artifacts import files, load_packed, packed_image
from mambaquant_ext.checkpoint import end_tokens, packed_images
from stages import hf_models
from stages.hf_models import logits, tiny_model, tokens
from tolerances import assert_equal

TENSORS, METADATA = "model.safetensors", "mambaquant.json"
IDS = tokens(2, 9)
REMEDY = "mambaquant pack"


@cache
def packed_model(preset="w8a8", **switches):
    chosen = recipe(preset).replace(**switches)
    return quantize_(tiny_model(), hf_models.calibration(), chosen, seed=7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with an image for the instruction set in use."""
    folder = tmp_path_factory.mktemp("saved")
    save(packed_model(), tiny_model().config, folder)
    prepack(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@cache
def expected():
    model = tiny_model()
    mambaquant_ext.run.swap.swap_(model, packed_model(), Fidelity.INTEGER)
    return logits(model, IDS)


def image_of(folder):
    return packed_image.image_path(folder, mambaquant_ext.current_isa())


def without_packing(monkeypatch):
    """From now on nothing is packed at load."""

    def fail(weight):
        raise AssertionError(f"a weight of shape {tuple(weight.shape)} is packed")

    monkeypatch.setattr(ops, "pack_gemm_weight", fail)


def packs(folder, monkeypatch):
    """How many weights load() packs by itself."""
    count = 0
    original = ops.pack_gemm_weight

    def counting(weight):
        nonlocal count
        count += 1
        return original(weight)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "pack_gemm_weight", counting)
        assert_equal(logits(load(folder), IDS), expected())
    return count


# Use


@pytest.mark.parametrize(
    ("preset", "switches"),
    [
        ("w8a8", {}),
        ("rtn", {}),
        ("quarot", {"quantize_embedding": False}),
        ("w8a8", {"quantize_head": False}),
    ],
    ids=str,
)
def test_bits_are_the_same_with_and_without_an_image(preset, switches, tmp_path, isa, monkeypatch):
    save(packed_model(preset, **switches), tiny_model().config, tmp_path)
    plain = logits(load(tmp_path), IDS)
    assert prepack(tmp_path) == tmp_path / f"packed-{isa}.safetensors"
    without_packing(monkeypatch)
    for verify in (None, True, False):
        assert_equal(logits(load(tmp_path, verify=verify), IDS), plain)


def test_kernels_read_the_mapped_file(folder):
    model = load(folder)
    weights = [model.lm_head.packed]
    for block in model.backbone.layers:
        mixer = block.executor
        weights += [mixer.in_proj, mixer.exit.out_proj]
        weights += [w for branch in mixer.branches for w in (branch.x_proj, branch.dt_proj)]
    for weight in weights:
        assert mapping_at(weight.packed.data_ptr()) == str(image_of(folder))
        assert weight.packed.data_ptr() % 64 == 0  # on cache lines
    assert sum(weight.acc_offset is not None for weight in weights) == 2  # one x_proj a block
    for block in model.backbone.layers:
        block.prepare()
    assert mapping_at(model.backbone.layers[0].executor.in_proj.packed.data_ptr()) == ""
    assert_equal(logits(model, IDS), expected())


def mapping_at(address):
    """The file that is mapped at an address, or ""."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_ = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return line.partition("/")[1] + line.partition("/")[2]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_image_is_a_safetensors_file_that_tells_what_it_is(folder):
    with safe_open(image_of(folder), framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        isa, layout, version = gemm_packing()
        assert metadata == {
            "format": "mambaquant-packed",
            "format_version": "1",
            "isa": isa,
            "layout": str(layout),
            "packing_version": str(version),
            "tensors_sha256": json.loads((folder / METADATA).read_text())["tensors_sha256"],
            "sha256": metadata["sha256"],
        }
        weight = load_packed(folder).blocks[1].in_proj
        assert_equal(file.get_tensor("layers.1.in_proj"), ops.pack_gemm_weight(weight)[0])
    of_a_block = {"in_proj", "branches.0.x_proj", "branches.0.dt_proj", "out_proj"}
    of_a_block |= {"branches.0.x_proj.acc_offset"}
    assert names == {f"layers.{i}.{name}" for i in (0, 1) for name in of_a_block} | {"head.lm_head"}


def test_image_is_the_same_bytes_each_time(folder):
    before = image_of(folder).read_bytes()
    prepack(folder)
    assert image_of(folder).read_bytes() == before


def test_image_for_another_instruction_set_is_left_alone(folder, monkeypatch):
    others = set(mambaquant_ext.supported_isas()) - {mambaquant_ext.current_isa()}
    if not others:
        pytest.skip("this processor runs one instruction set only")
    for isa in others:
        prepack(folder, isa)
        with forced_isa(isa):
            assert packs(folder, monkeypatch) == 0
    image_of(folder).unlink()
    assert packs(folder, monkeypatch) == 9


def test_emulation_needs_no_image(folder):
    plain = load(folder, Fidelity.EMULATED)
    image_of(folder).write_bytes(b"")
    assert_equal(logits(load(folder, Fidelity.EMULATED), IDS), logits(plain, IDS))


def test_model_of_an_image_is_copied_pickled_and_prepared_again(folder):
    model = load(folder)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    # A copy takes no more than its own bytes along.
    block = copied.backbone.layers[0].executor
    assert block.in_proj.packed.untyped_storage().nbytes() == block.in_proj.packed.numel()
    for module in model.modules():
        if isinstance(module, mambaquant_ext.run.modules.FrozenModule):
            module.prepare()
    for changed in (copied, pickled, model):
        assert_equal(logits(changed, IDS), expected())


def test_files_are_never_written_through_the_map(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model = load(folder)
    for tensor in [model.lm_head.packed.packed, *model.buffers()]:
        tensor.zero_()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_packing_again_keeps_a_model_that_is_loaded(folder):
    model = load(folder)
    prepack(folder)
    assert_equal(logits(model, IDS), expected())


def test_saving_removes_images_of_what_was_there(folder, monkeypatch):
    save(packed_model("rtn"), tiny_model().config, folder)
    assert not list(folder.glob("packed-*"))
    load(folder)


def test_fewer_than_8_bits_are_not_packed(tmp_path):
    chosen = recipe("w8a8").replace(weight_bits=4)
    packed = quantize_(tiny_model(), hf_models.calibration(), chosen, Fidelity.EMULATED)
    save(packed, tiny_model().config, tmp_path)
    with pytest.raises(ValueError, match="expected 8 bits"):
        prepack(tmp_path)
    assert not list(tmp_path.glob("packed-*"))


def test_unknown_instruction_set_is_refused(folder):
    with pytest.raises(ValueError, match="expected one of scalar, avx2, avx512_vnni, got 'sse'"):
        prepack(folder, "sse")


@pytest.mark.parametrize("exception", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["sha256", "_with_checksum", "_bytes"])
def test_interrupted_packing_leaves_the_image_that_was_there(step, exception, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def fail(*_args, **_kwargs):
        raise exception

    with monkeypatch.context() as patch:
        patch.setattr(packed_image, step, fail)
        with pytest.raises(type(exception)):
            prepack(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# What is read


BIG_VOCAB = 1 << 18


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A checkpoint whose head and embedding, 12.6 MB each, are most of it."""
    folder = tmp_path_factory.mktemp("big")
    packed, generator = packed_model(), torch.Generator().manual_seed(0)
    assert packed.head is not None
    table = torch.randint(-127, 128, (BIG_VOCAB, 48), generator=generator, dtype=torch.int8)
    ones = torch.full((BIG_VOCAB,), 0.01)
    head = dataclasses.replace(
        packed.head, embedding=table, lm_head=table, embedding_scale=ones, lm_head_scale=ones
    )
    config = tiny_model(vocab_size=BIG_VOCAB).config
    save(dataclasses.replace(packed, head=head), config, folder)
    prepack(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_what_a_kernel_asks_for_is_read(big):
    """Resident pages of the two maps, before and after the kernels have run."""
    head_bytes = BIG_VOCAB * 48
    model = load(big)
    assert resident(image_of(big)) < head_bytes / 4
    logits(model, IDS)
    assert resident(image_of(big)) > head_bytes
    # Scales and the like, and rows of the embedding; whole tables would be 25 MB.
    assert resident(big / TENSORS) < head_bytes
    del model
    verified = load(big, verify=True)  # what the figures above would be otherwise
    assert resident(big / TENSORS) > 2 * head_bytes
    del verified


def resident(path):
    """Bytes of a file that this process has mapped and touched."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_inside = line.endswith(str(path))
        elif is_inside and name == "Rss:":
            total += int(values[0]) * 1024
    return total


# A runner without transformers


def test_runner_gives_the_logits_of_the_model(folder, isa):
    prepack(folder)
    runner = load_runner(folder)
    state = runner.new_state(batch=2)
    assert_equal(runner.forward(IDS, state), logits(load(folder), IDS)[:, -1])


def test_runner_imports_no_transformers(folder):
    program = (
        "import sys, torch\n"
        "from mambaquant_ext import load_runner\n"
        "runner = load_runner(sys.argv[1])\n"
        "runner.forward(torch.ones(1, 3, dtype=torch.int64), runner.new_state())\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


def test_runner_checks_the_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 49}))
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_size: expected 48, got 49"):
        load_runner(folder)


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, 3, (3,)),
        (None, None, ()),
        (None, [3, 4], (3, 4)),
        ({"eos_token_id": 5}, 3, (5,)),
        ({"eos_token_id": [5, 6]}, 3, (5, 6)),
        ({}, 3, ()),
    ],
)
def test_end_tokens_are_those_of_the_loaded_model(generation, config, wanted, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert end_tokens(folder) == wanted
    found = load(folder).generation_config.eos_token_id
    assert wanted == (
        () if found is None else tuple(found) if isinstance(found, list) else (found,)
    )


@pytest.mark.parametrize("value", ["x", 1.0, True, -1, [1, -1], [1, None], {}], ids=repr)
def test_end_tokens_of_another_kind_are_refused(value, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: expected"):
        end_tokens(folder)


# Damage


def refused(folder, *named, verify=None):
    """load() raises CheckpointError, which names the image and the remedy."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    for text in (str(image_of(folder)), f"{REMEDY} {folder}", *named):
        assert text in message, f"{text!r} is not in {message!r}"


@pytest.mark.parametrize("verify", [None, True, False])
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"\0" * 8, b"3" * 90])
def test_foreign_content_is_refused(content, verify, folder):
    image_of(folder).write_bytes(content)
    refused(folder, verify=verify)


def test_folder_in_place_of_an_image_is_refused(folder):
    image_of(folder).unlink()
    image_of(folder).mkdir()
    refused(folder)


@pytest.mark.parametrize("verify", [None, True, False])
def test_truncated_image_is_refused(verify, folder):
    path = image_of(folder)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    offsets = {*range(10), start - 1, start, start + 1, len(content) - 1}
    offsets |= {len(content) * i // 20 for i in range(20)}
    for offset in sorted(offsets):
        path.write_bytes(content[:offset])
        refused(folder, verify=verify)
    path.write_bytes(content + b"\0")
    refused(folder, verify=verify)


def test_any_flipped_byte_is_refused_where_asked_for(folder):
    path = image_of(folder)
    content = path.read_bytes()
    used = len(content[8:].partition(b"   ")[0])
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(8, len(content), (30,), generator=generator).tolist()
    offsets += torch.randint(8, used, (60,), generator=generator).tolist()
    ignored = 0
    for offset in [*range(8), *offsets]:
        changed = bytearray(content)
        changed[offset] ^= 0x01
        path.write_bytes(changed)
        if is_of_another_version(path):
            ignored += 1
            continue
        refused(folder, verify=True)
    assert ignored <= 3


def is_of_another_version(path):
    """Whether a flip made one of the three numbers another number: such an image is not looked at."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except Exception:
        return False
    numbers = [found.get(name, "") for name in ("format_version", "layout", "packing_version")]
    _, layout, version = gemm_packing()
    return all(n.isdigit() for n in numbers) and numbers != ["1", str(layout), str(version)]


def test_flipped_byte_of_the_header_changes_no_result(folder):
    """Without a checksum: whatever decides what is computed is compared with the checkpoint."""
    path = image_of(folder)
    content = path.read_bytes()
    used = len(content[8:].partition(b"   ")[0])
    loaded = 0
    for offset in range(8, 8 + used, 7):
        changed = bytearray(content)
        changed[offset] ^= 0x01
        path.write_bytes(changed)
        try:
            model = load(folder)
        except CheckpointError:
            refused(folder)
            continue
        loaded += 1
        assert_equal(logits(model, IDS), expected())
    assert loaded <= 64 / 7 + 4  # within the checksum, or another version's


def test_edited_weight_is_found_by_the_checksum(folder):
    path = image_of(folder)
    content = bytearray(path.read_bytes())
    content[-4096] ^= 1
    path.write_bytes(content)
    refused(folder, "SHA-256", "changed after it was written", verify=True)
    load(folder)
    with pytest.raises(CheckpointError, match="SHA-256"):
        packed_images(folder)


def test_edited_checkpoint_is_found_by_its_checksum_with_an_image_too(folder):
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="tensors_sha256"):
        load(folder, verify=True)


def test_image_of_other_tensors_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    save(packed_model("rtn"), tiny_model().config, other)
    shutil.copy(prepack(other), image_of(folder))
    for verify in (None, True, False):
        refused(folder, "tensors_sha256", verify=verify)
    prepack(folder)
    assert_equal(logits(load(folder), IDS), expected())


def test_small_tensors_are_checked_with_an_image_too(folder):
    """The canonical file is changed and its checksum respelled everywhere, as somebody who hides an edit would."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors["layers.0.out_proj_scale"][3] = torch.nan
    files.save_file(tensors, folder / TENSORS, {"format": "mambaquant"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.out_proj_scale: expected finite"):
        load(folder)


def respell(path, change):
    """Changes an image's header and makes its checksum fit."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["sha256"] = "0" * 64
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    blank = files.sha256(path)
    path.write_bytes(
        path.read_bytes().replace(b'"sha256":"' + b"0" * 64, f'"sha256":"{blank}'.encode())
    )


def test_respelling_nothing_is_no_damage(folder):
    before = image_of(folder).read_bytes()
    respell(image_of(folder), lambda header: None)
    assert image_of(folder).read_bytes() == before
    load(folder, verify=True)


FIELDS = [
    "format",
    "format_version",
    "isa",
    "layout",
    "packing_version",
    "tensors_sha256",
    "sha256",
]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, "", "x", "-1", "1.0", "\u0661", "0" * 65, "9" * 5000])
def test_metadata_with_a_wrong_value_in_any_field_are_refused(field, value, folder):
    def change(header):
        if value is None:
            del header["__metadata__"][field]
        else:
            header["__metadata__"][field] = value

    respell(image_of(folder), change)
    if field == "sha256" and value is not None:
        refused(folder, "SHA-256", verify=True)
    else:
        refused(folder, field)


@pytest.mark.parametrize("damage", ["missing", "renamed", "extra", "shape", "dtype", "swapped"])
def test_table_that_does_not_fit_the_checkpoint_is_refused(damage, folder):
    first, second = "layers.0.in_proj", "layers.1.in_proj"

    def change(header):
        if damage == "missing":
            del header[first]
        if damage == "renamed":
            header["layers.7.in_proj"] = header.pop(first)
        if damage == "extra":
            size = max(entry["data_offsets"][1] for name, entry in header.items() if "." in name)
            header["extra"] = {"dtype": "I8", "shape": [0], "data_offsets": [size, size]}
        if damage == "shape":
            header[first]["shape"] = [1, *header[first]["shape"]]
        if damage == "dtype":
            header[first]["dtype"] = "U8"
        if damage == "swapped":
            header[first], header[second] = header[second], header[first]

    respell(image_of(folder), change)
    named = {"missing": "", "renamed": "layers.7.in_proj", "extra": "unknown tensor extra"}
    for verify in (None, True):
        refused(folder, named.get(damage, first), verify=verify)


@pytest.mark.parametrize("field", ["format_version", "layout", "packing_version"])
@pytest.mark.parametrize("value", ["0", "77"])
def test_image_of_another_version_is_not_used(field, value, folder, monkeypatch):
    """What another release of the package left behind is no damage."""
    respell(image_of(folder), lambda header: header["__metadata__"].update({field: value}))
    assert packs(folder, monkeypatch) == 9
    assert packed_images(folder) == {
        mambaquant_ext.current_isa(): "of another version of the kernels"
    }


def test_images_are_listed(folder):
    prepack(folder, "scalar")
    shutil.copy(image_of(folder), folder / "packed-sve.safetensors")
    assert packed_images(folder) == {
        "scalar": "ready",
        mambaquant_ext.current_isa(): "ready",
        "sve": "for an instruction set that this build lacks",
    }


def test_image_under_the_name_of_another_instruction_set_is_refused(folder):
    if mambaquant_ext.current_isa() == "scalar":
        pytest.skip("this processor runs one instruction set only")
    with forced_isa("scalar"):
        other = image_of(folder)
    shutil.copy(image_of(folder), other)
    respell(other, lambda header: header["__metadata__"].update(layout="0"))
    with forced_isa("scalar"):
        refused(folder, "isa: expected 'scalar'")
