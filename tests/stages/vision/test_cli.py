"""The command line on vision models: images in place of text, the same exit codes, one clear line for every mistake."""

import gzip
import json
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench import docs_model, fashion_mnist
from mambaquant_ext import load
from mambaquant_ext.evaluate import agreement, classify
from mambaquant_ext.images import load_images, normalise
from mambaquant_ext.model.adapters import adapter_names
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.model.vision import VimConfig, VisionMamba
from stages.commands import in_process
from stages.vision.float_models import random_model

CLASSES = ("ankle boot", "zebra", "bag")  # not in the order of the alphabet
CONFIG = VimConfig(
    embed_dim=16,
    depth=2,
    num_classes=len(CLASSES),
    channels=1,
    img_size=8,
    patch_size=4,
    stride=4,
    mean=(0.4,),
    std=(0.3,),
    class_names=CLASSES,
)
CALIBRATION, TEST = 24, 12


def pictures(count, seed, channels=1, size=CONFIG.img_size):
    """Random bytes (count, size, size[, channels]) and labels."""
    generator = np.random.default_rng(seed)
    shape = (count, size, size) if channels == 1 else (count, size, size, channels)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    return images, generator.integers(0, len(CLASSES), count)


def prepared(images):
    """(count, size, size) bytes as the model takes them."""
    return normalise(torch.from_numpy(images)[:, None], CONFIG.mean, CONFIG.std)


def write_model(folder):
    """A random model that says each of its classes of some random images."""
    folder.mkdir()
    model = random_model(VisionMamba, CONFIG).float()
    model.head.bias.data -= model(prepared(pictures(50, seed=0)[0])).mean(0)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))


def write_idx(folder, images, labels):
    for name, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        path = folder / f"test-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(head + array.tobytes()))
    return folder / "test-images-idx3-ubyte.gz"


def write_folder(folder, images, labels, names=CLASSES):
    """One subfolder a class, files in the order of the images within each."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a float model, images in every form, and the model quantized by the command."""
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "float")
    images, labels = pictures(CALIBRATION, seed=1)
    np.savez(folder / "calib.npz", images=images, labels=labels)
    images, labels = pictures(TEST, seed=2)
    np.savez(folder / "test.npz", images=images, labels=labels)
    np.savez(folder / "bare.npz", images=images)
    write_idx(folder, images, labels)
    write_folder(folder / "folder", images, labels)
    np.savez(folder / "rgb.npz", images=pictures(4, seed=3, channels=3)[0], labels=[0, 1, 2, 0])
    np.savez(folder / "large.npz", images=pictures(4, seed=3, size=9)[0], labels=[0, 1, 2, 0])
    (folder / "text.txt").write_text("words " * 100)
    assert in_process(*quantizing(folder), "--out", folder / "int8") == 0
    return folder


def quantizing(work, calib="calib.npz"):
    return "quantize", work / "float", "--calib", work / calib


@pytest.fixture
def fails(command):
    """Asserts an exit status, nothing on stdout, and what stderr says."""

    def run(status, says, *arguments):
        actual, out, err = command(*arguments)
        assert actual == status, f"exit status {actual}: {err}"
        assert out == ""
        for text in says:
            assert text in " ".join(err.replace("│", " ").split()), err
        if status == 1:
            assert err.splitlines()[-1].startswith("mambaquant: "), err

    return run


# What the commands do


def test_quantize_reports_what_it_wrote(as_json, command, work, tmp_path):
    values = as_json(
        *quantizing(work), "--out", tmp_path / "a", "--samples", "7", "--batch", "3", "--seed", "5"
    )
    assert values["recipe"]["name"] == "w8a8"
    assert values["calibration"]["samples"] == 7
    assert values["calibration"]["batches"] == 3
    assert values["calibration"]["seed"] == 5
    assert values["size_bytes"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    status, out, _ = command(*quantizing(work), "--out", tmp_path / "b", "--recipe", "rtn")
    assert status == 0
    assert f"{CALIBRATION} images" in out


def test_quantized_folder_builds_its_model_and_keeps_what_images_need(work):
    config = json.loads((work / "int8" / "config.json").read_text())
    assert config["architecture"] == "VisionMamba"
    assert config["class_names"] == list(CLASSES)
    assert (config["mean"], config["std"]) == ([0.4], [0.3])
    assert load(work / "int8").config == CONFIG


def test_quantize_is_reproducible_and_follows_its_seed(as_json, work, tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        as_json(*quantizing(work), "--out", tmp_path / name, "--samples", "9", "--seed", seed)
        metadata = json.loads((tmp_path / name / "mambaquant.json").read_text())
        found.append((metadata["tensors_sha256"], metadata["calibration"]["sha256"]))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


def test_calibration_needs_no_labels_and_any_form_will_do(as_json, work, tmp_path):
    checksums = []
    for index, calib in enumerate(("test.npz", "bare.npz", "test-images-idx3-ubyte.gz", "folder")):
        values = as_json(*quantizing(work, calib), "--out", tmp_path / str(index))
        checksums.append(values["calibration"]["sha256"])
        assert values["calibration"]["samples"] == TEST
    assert len(set(checksums[:3])) == 1
    assert checksums[3] != checksums[0]  # sorted by class


def test_eval_sets_the_quantized_model_beside_the_float_one(as_json, work):
    options = ("--images", work / "test.npz", "--batch", "5")
    values = as_json("eval", work / "int8", *options, "--float", work / "float")
    assert list(values) == ["float32", "integer"]

    test = load_images(work / "test.npz")
    expected = [
        classify(m, normalise(test.images, CONFIG.mean, CONFIG.std), test.labels)
        for m in (load_float_model(work / "float"), load(work / "int8"))
    ]
    for row, own, folder in zip(values.values(), expected, ("float", "int8"), strict=True):
        assert row["correct"] == own.correct
        assert row["images"] == TEST
        assert row["top1"] == own.correct / TEST
        assert row["images_per_second"] > 0
        assert row["size_bytes"] == (work / folder / "model.safetensors").stat().st_size
    assert "agreement" not in values["float32"]
    assert values["integer"]["agreement"] == agreement(*expected)
    assert values["integer"]["agreeing"] == round(agreement(*expected) * TEST)

    emulated = as_json("eval", work / "int8", *options, "--emulated")
    assert list(emulated) == ["emulated"]
    assert "agreement" not in emulated["emulated"]
    assert list(as_json("eval", work / "float", *options)) == ["float32"]


def test_eval_counts_disagreement(as_json, work, tmp_path):
    """The same model with its classes turned around agrees with nothing."""
    shutil.copytree(work / "float", tmp_path / "other")
    model = load_float_model(work / "float")
    model.head.weight.data = -model.head.weight.data
    model.head.bias.data = -model.head.bias.data
    save_file(model.state_dict(), tmp_path / "other" / "model.safetensors")
    options = ("--images", work / "test.npz", "--float", tmp_path / "other")
    values = as_json("eval", work / "int8", *options)
    assert values["integer"]["agreeing"] == 0
    assert values["integer"]["agreement"] == 0


def test_eval_prints_a_table(command, work):
    options = ("--images", work / "test.npz", "--float", work / "float", "--limit", "8")
    status, out, _ = command("eval", work / "int8", *options)
    assert status == 0
    for text in ("test.npz, 8 images", "top-1", "agrees with float", "images/s", "MB", "/ 8"):
        assert text in out


def test_eval_limit_keeps_the_first_images(as_json, work):
    row = as_json("eval", work / "float", "--images", work / "test.npz", "--limit", "3")["float32"]
    test = load_images(work / "test.npz")[:3]
    model = load_float_model(work / "float")
    expected = classify(model, normalise(test.images, CONFIG.mean, CONFIG.std), test.labels)
    assert (row["images"], row["correct"]) == (3, expected.correct)


@pytest.fixture(scope="module")
def labelled_by_the_model(work):
    """Images whose labels are what the float model says."""
    images, _ = pictures(TEST, seed=4)
    labels = load_float_model(work / "float")(prepared(images)).argmax(1).numpy()
    assert set(labels) == {0, 1, 2}
    return images, labels


def all_right(as_json, work, path):
    row = as_json("eval", work / "float", "--images", path)["float32"]
    assert (row["correct"], row["images"]) == (TEST, TEST)


def test_subfolders_are_matched_by_the_names_of_the_classes(
    as_json, work, tmp_path, labelled_by_the_model
):
    all_right(as_json, work, write_folder(tmp_path / "x", *labelled_by_the_model))


def test_subfolders_may_be_numbered_as_the_classes(as_json, work, tmp_path, labelled_by_the_model):
    folder = write_folder(tmp_path / "x", *labelled_by_the_model, names=("0", "01", "2"))
    all_right(as_json, work, folder)


def test_subfolders_of_other_names_count_in_their_order(
    as_json, fails, work, tmp_path, labelled_by_the_model
):
    folder = write_folder(tmp_path / "x", *labelled_by_the_model, names=("n01", "n02", "n03"))
    all_right(as_json, work, folder)
    shutil.rmtree(folder / "n02")
    says = ["named or numbered", "3", "got 2"]
    fails(1, says, "eval", work / "float", "--images", folder)


def test_idx_files(as_json, work, tmp_path, labelled_by_the_model):
    all_right(as_json, work, write_idx(tmp_path, *labelled_by_the_model))


def test_folders_are_scaled_to_the_model(as_json, work, tmp_path):
    generator = np.random.default_rng(6)
    for index, size in enumerate([(20, 31, 3), (9, 8, 3), (8, 8, 3)]):
        image = generator.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    values = as_json(*quantizing(work)[:3], tmp_path, "--out", tmp_path / "out", "--recipe", "rtn")
    assert values["calibration"]["samples"] == 3
    assert values["calibration"]["values"] == 3 * CONFIG.img_size**2


def test_inspect_of_a_float_model_shows_every_step_of_every_branch(
    as_json, command, work, tmp_path
):
    options = ("inspect", work / "float", "--calib", work / "calib.npz", "--samples", "20")
    rows = as_json(*options)
    assert {row["layer"] for row in rows} == {0, 1}
    assert {row["site"] for row in rows} >= {"in", "out", "dt.0", "dt.1", "C.0", "C.1", "h.1"}
    assert {row["step"] for row in rows if row["site"] == "out"} == {"float", "S2", "R2"}
    status, out, _ = command(*options, "--plot", tmp_path / "spread.png")
    assert status == 0
    assert "dt.1" in out
    assert (tmp_path / "spread.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_draws_every_branch(work, tmp_path, as_json, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **kw: drawn.append((y, kw)) or plot(self, x, y, **kw)
    )
    options = ("--calib", work / "calib.npz", "--samples", "20", "--plot", tmp_path / "x.png")
    rows = as_json("inspect", work / "float", *options)
    assert len(drawn) == 2 * 2 * (2 + 3 * 2)  # figures x layers x (in, out, three of two branches)
    shown = sorted(value for values, _ in drawn for value in values)
    assert shown == sorted(row[f] for row in rows for f in ("variance_spread", "max_over_rms"))
    assert sum(kw["linestyle"] == "dashed" for _, kw in drawn) == 2 * 2 * 3


def test_inspect_of_a_quantized_folder_shows_its_recipe(as_json, command, work):
    values = as_json("inspect", work / "int8")
    assert values["adapter"] == "vim"
    assert values["recipe"]["name"] == "w8a8"
    assert values["layers"] == 2
    assert values["calibration"]["samples"] == CALIBRATION
    status, out, _ = command("inspect", work / "int8")
    assert status == 0
    assert "vim" in out


def test_info_lists_the_adapters(as_json):
    assert as_json("info")["adapters"] == list(adapter_names())


def test_trained_checkpoint_end_to_end(as_json, tmp_path):
    """Quantized on 16 images, the trained model still knows its classes."""
    folder = fashion_mnist.FOLDER
    calib = ("--calib", fashion_mnist.CALIBRATION, "--samples", "16", "--batch", "16")
    as_json("quantize", folder, *calib, "--out", tmp_path / "int8")
    test = ("--images", fashion_mnist.TEST, "--limit", "24")
    values = as_json("eval", tmp_path / "int8", *test, "--float", folder)
    assert values["float32"]["correct"] >= 20
    assert values["integer"]["agreeing"] >= 22
    assert values["integer"]["size_bytes"] < values["float32"]["size_bytes"] / 2


# What a user can get wrong


def test_mixtures_of_models_and_data_exit_with_2_before_any_work(
    fails, work, tmp_path, monkeypatch
):
    def no_work(*_args, **_kwargs):
        raise AssertionError("loaded a model")

    for name in ("quantize", "evaluate", "inspect", "generate"):
        monkeypatch.setattr(f"mambaquant_ext.cli.{name}.load_float_model", no_work)
    for name in ("evaluate.load", "generate.load_runner"):
        monkeypatch.setattr(f"mambaquant_ext.cli.{name}", no_work)
    language, vision, int8 = docs_model.FOLDER, work / "float", work / "int8"
    text, npz, out = work / "text.txt", work / "test.npz", ("--out", tmp_path / "o")
    idx = work / "test-images-idx3-ubyte.gz"
    for says, *arguments in (
        (["--calib", "is a vision model", "text.txt"], "quantize", vision, "--calib", text, *out),
        (["--calib", "is a vision model", "text.txt"], "inspect", vision, "--calib", text),
        (["--calib", "language model", "test.npz"], "quantize", language, "--calib", npz, *out),
        (["--calib", "language model", "idx3"], "quantize", language, "--calib", idx, *out),
        (["--calib", "language model"], "inspect", language, "--calib", work / "folder"),
        (["--window"], *quantizing(work), *out, "--window", "8"),
        (["--window"], "inspect", vision, "--calib", npz, "--window", "8"),
        (["--window"], "eval", int8, "--images", npz, "--window", "8"),
        (["--images alone", "vision model"], "eval", int8, "--text", text),
        (["--images alone", "vision model"], "eval", vision, "--text", text),
        (["--images alone"], "eval", int8, "--text", text, "--images", npz),
        (["--images alone"], "eval", int8),
        (["--text alone", "language model"], "eval", language, "--images", npz),
        (["--text alone"], "eval", language, "--images", npz, "--text", text),
        (["--text alone"], "eval", language),
        (["--float", "vision", "language"], "eval", int8, "--images", npz, "--float", language),
        (["--float", "quantized"], "eval", vision, "--images", npz, "--float", vision),
        (["language model", "int8"], "generate", int8, "--prompt", "x"),
        (["language model", "float"], "generate", vision, "--prompt", "x"),
    ):
        fails(2, says, *arguments)
    assert not (tmp_path / "o").exists()


def test_bad_arguments_exit_with_2(fails, work, tmp_path):
    out = ("--out", tmp_path / "o")
    fails(2, ["nowhere.npz"], *quantizing(work, "nowhere.npz"), *out)
    fails(2, ["--calib"], "inspect", work / "float")
    fails(2, ["--samples"], *quantizing(work), *out, "--samples", "0")
    fails(2, ["nowhere"], "eval", work / "int8", "--images", work / "nowhere")
    fails(2, ["another folder"], *quantizing(work), "--out", work / "float")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rgb.npz", ["rgb.npz", "1 channels", "got 3"]),
        ("large.npz", ["large.npz", "8 x 8", "9 x 9"]),
    ],
)
def test_images_that_the_model_cannot_take_exit_with_1(fails, work, tmp_path, name, says):
    fails(1, says, *quantizing(work, name), "--out", tmp_path / "o")
    fails(1, says, "inspect", work / "float", "--calib", work / name)
    fails(1, says, "eval", work / "int8", "--images", work / name)
    assert not (tmp_path / "o").exists()


def test_labels_that_cannot_be_compared_exit_with_1(fails, work, tmp_path):
    fails(1, ["bare.npz", "labels"], "eval", work / "int8", "--images", work / "bare.npz")
    images, labels = pictures(4, seed=1)
    np.savez(tmp_path / "x.npz", images=images, labels=[0, 1, 3, 2])
    says = ["x.npz", "0 to 2", "got 3"]
    fails(1, says, "eval", work / "int8", "--images", tmp_path / "x.npz")
    for names, expected in (
        (("zebra", "bag", "shoe"), ["shoe", "expected one of ankle boot, zebra, bag"]),
        (("0", "1", "9" * 30), ["0 to 2", "got 999"]),
    ):
        folder = write_folder(tmp_path / names[2], images[:3], [0, 1, 2], names)
        fails(1, expected, "eval", work / "int8", "--images", folder)
    assert labels.max() < 3


def test_files_that_are_no_images_exit_with_1(fails, work, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    fails(1, ["x.npz"], "eval", work / "int8", "--images", tmp_path / "x.npz")
    fails(1, ["empty", "found none"], "eval", work / "int8", "--images", tmp_path / "empty")
    fails(1, ["text.txt", "expected an .npz"], "eval", work / "int8", "--images", work / "text.txt")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, ["config.json", "not found"]),
        ("config.json", b"{", ["config.json", "JSON"]),
        ("config.json", b'{"architecture": "ResNet"}', ["config.json", "known architecture"]),
        ("config.json", b'{"architecture": "VisionMamba"}', ["config.json", "missing"]),
        ("model.safetensors", None, ["model.safetensors"]),
        ("model.safetensors", b"x" * 100, ["model.safetensors"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["float", "int8"])
def test_damaged_folder_exits_with_1(fails, work, tmp_path, name, file, content, says):
    shutil.copytree(work / name, tmp_path / name)
    path = tmp_path / name / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    fails(1, says, "eval", tmp_path / name, "--images", work / "test.npz")
    if name == "float":
        calib = ("--calib", work / "calib.npz")
        fails(1, says, "quantize", tmp_path / name, *calib, "--out", tmp_path / "o")
        fails(1, says, "inspect", tmp_path / name, *calib)


def test_quantized_in_place_of_float_exits_with_1(fails, work, tmp_path):
    says = ["float model", "quantized already"]
    calib = ("--calib", work / "calib.npz")
    fails(1, says, "quantize", work / "int8", *calib, "--out", tmp_path / "o")
    test = ("--images", work / "test.npz")
    fails(1, says, "eval", work / "int8", *test, "--float", work / "int8")


def test_model_that_says_nothing_of_its_images_exits_with_1(fails, work, monkeypatch):
    monkeypatch.setattr(
        "mambaquant_ext.cli.data.vision_config", lambda _folder: config_without_mean_and_std()
    )
    says = ["expected a classifier of images", "no mean, std"]
    fails(1, says, "eval", work / "int8", "--images", work / "test.npz")


def config_without_mean_and_std():
    names = ("input_size", "channels", "num_classes", "class_names")
    return type("Config", (), {name: getattr(CONFIG, name) for name in names})()


def test_too_few_images_exit_with_1(fails, work, tmp_path):
    options = ("--out", tmp_path / "o", "--samples", "1")
    fails(1, ["calibration samples for 16 channels"], *quantizing(work), *options)


def test_images_without_pillow_name_the_extra(fails, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    says = ["mambaquant_ext[vision]"]
    fails(1, says, "eval", work / "int8", "--images", work / "folder")


def test_vision_models_need_no_transformers(as_json, work, monkeypatch, tmp_path):
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    as_json(*quantizing(work), "--out", tmp_path / "o")
    as_json("eval", tmp_path / "o", "--images", work / "test.npz", "--float", work / "float")
