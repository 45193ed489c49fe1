"""Reading images: what each source holds comes back exactly, and what is malformed is refused by name."""

import gzip
import io
import re
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from bench import fashion_mnist
from mambaquant_ext.images import ImageSet, load_images, normalise
from tolerances import NORMALISED_ROUNDINGS

IDX = "t10k-images-idx3-ubyte"
IDX_LABELS = "t10k-labels-idx1-ubyte"
LOSSLESS = (".png", ".bmp", ".webp")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array, magic=None):
    head = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_image(path, array, **options):
    if path.suffix == ".webp":
        options["lossless"] = True
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, **options)


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


def assert_holds(loaded, images, labels=None):
    """`images` is (count, height, width, channels)."""
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.is_contiguous()
    assert torch.equal(loaded.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert len(loaded) == len(images)
    if labels is None:
        assert loaded.labels is None
    else:
        assert loaded.labels.dtype == torch.int64
        assert loaded.labels.tolist() == list(labels)


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8", np.uint64])
def test_npz(tmp_path, shape, dtype):
    images, labels = pixels(*shape), [3, 1, 4, 1, 5]
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(labels, dtype), other=np.ones(2))
    assert_holds(load_images(tmp_path / "a.npz"), images.reshape(5, 4, 6, -1), labels)


def test_npz_without_labels_and_in_column_order(tmp_path):
    images = np.asfortranarray(pixels(5, 4, 6, 3))
    np.savez(tmp_path / "a.npz", images=images)
    assert_holds(load_images(tmp_path / "a.npz"), images)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("labels_suffix", ["", ".gz", None])
@pytest.mark.parametrize("dash", ["-", "."])
def test_idx(tmp_path, suffix, labels_suffix, dash):
    images, labels = pixels(5, 4, 6), np.array([3, 1, 4, 1, 255], np.uint8)
    files = {f"t10k-images{dash}idx3-ubyte{suffix}": images}
    if labels_suffix is not None:
        files[f"t10k-labels{dash}idx1-ubyte{labels_suffix}"] = labels
    files[f"train-labels{dash}idx1-ubyte"] = np.zeros(9, np.uint8)  # another split's
    for name, array in files.items():
        data = idx(array)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    loaded = load_images(tmp_path / f"t10k-images{dash}idx3-ubyte{suffix}")
    assert_holds(loaded, images[..., None], None if labels_suffix is None else labels)


def test_labels_packed_as_the_images_are_preferred(tmp_path):
    images = pixels(2, 4, 6)
    for suffix, pack, label in (("", bytes, 1), (".gz", gzip.compress, 2)):
        (tmp_path / f"{IDX}{suffix}").write_bytes(pack(idx(images)))
        (tmp_path / f"{IDX_LABELS}{suffix}").write_bytes(pack(idx(np.full(2, label, np.uint8))))
    assert load_images(tmp_path / IDX).labels.tolist() == [1, 1]
    assert load_images(tmp_path / f"{IDX}.gz").labels.tolist() == [2, 2]


def test_flat_folder_in_the_order_of_names(tmp_path):
    images = pixels(3, 4, 6, 3)
    for name, image in zip(["b.PNG", "a.bmp", "c.webp"], images, strict=True):
        write_image(tmp_path / name, image)
    (tmp_path / ".hidden.png").write_bytes(b"nothing")
    (tmp_path / "README.txt").write_bytes(b"nothing")
    loaded = load_images(tmp_path)
    assert_holds(loaded, images[[1, 0, 2]])
    assert loaded.class_names == ()


def test_subfolders_are_classes(tmp_path):
    images = pixels(4, 4, 6, 3)
    for name, image in zip(
        ["cat/1.png", "dog/1.png", "ant/2.png", "ant/1.png"], images, strict=True
    ):
        write_image(tmp_path / name, image)
    (tmp_path / ".cache").mkdir()
    loaded = load_images(tmp_path)
    assert_holds(loaded, images[[3, 2, 0, 1]], [0, 0, 1, 2])
    assert loaded.class_names == ("ant", "cat", "dog")


def test_jpeg(tmp_path):
    image = np.full((8, 8, 3), (200, 30, 90), np.uint8)
    for name in ("a.jpg", "b.JPEG"):
        write_image(tmp_path / name, image, quality=95)
    loaded = load_images(tmp_path)
    assert loaded.images.shape == (2, 3, 8, 8)
    error = loaded.images.int() - torch.tensor([200, 30, 90]).view(3, 1, 1)
    assert int(error.abs().max()) <= 3  # the codec's own loss


def test_channels_are_converted(tmp_path):
    grey = pixels(4, 6)
    write_image(tmp_path / "grey" / "a.png", grey)
    assert_holds(load_images(tmp_path / "grey", channels=1), grey[None, ..., None])
    assert_holds(load_images(tmp_path / "grey"), np.repeat(grey[None, ..., None], 3, axis=3))
    colour = pixels(4, 6, 4)
    write_image(tmp_path / "alpha" / "a.png", colour)
    assert_holds(load_images(tmp_path / "alpha", channels=3), colour[None, ..., :3])
    luma = load_images(tmp_path / "alpha", channels=1).images[0, 0].double()
    exact = torch.from_numpy(colour[..., :3] @ np.array([0.299, 0.587, 0.114]))  # ITU-R BT.601
    assert (luma - exact).abs().max() <= 1
    palette = Image.fromarray(colour[..., :3]).quantize(16)
    (tmp_path / "palette").mkdir()
    palette.save(tmp_path / "palette" / "a.png")
    assert_holds(load_images(tmp_path / "palette"), np.array(palette.convert("RGB"))[None])


def test_a_size_scales_to_cover_and_cuts_the_middle_out(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the middle third alone is cut out, still square
    write_image(tmp_path / "wide.png", wide)
    write_image(tmp_path / "tall.png", wide.transpose(1, 0, 2))
    write_image(tmp_path / "exact.png", np.full((4, 4, 3), 200, np.uint8))
    loaded = load_images(tmp_path, size=(4, 4))
    assert loaded.images.shape == (3, 3, 4, 4)
    assert (
        int((loaded.images.int() - 200).abs().max()) <= 24
    )  # bicubic rings at the edge of the cut
    loaded = load_images(tmp_path, size=(6, 3), channels=1)
    assert loaded.images.shape == (3, 1, 6, 3)


def test_a_size_that_images_have_leaves_them_as_they_are(tmp_path):
    images = pixels(1, 4, 6, 3)
    write_image(tmp_path / "a.png", images[0])
    assert_holds(load_images(tmp_path, size=(4, 6)), images)


@pytest.mark.parametrize("name", ["a.npz", IDX])
def test_arrays_must_have_the_size_and_channels_asked_for(tmp_path, name):
    images = pixels(2, 4, 6)
    data = npz(images=images) if name == "a.npz" else idx(images)
    (tmp_path / name).write_bytes(data)
    assert_holds(load_images(tmp_path / name, size=(4, 6), channels=1), images[..., None])
    with pytest.raises(ValueError, match=f"{name}: expected images of 6 x 4, got 4 x 6"):
        load_images(tmp_path / name, size=(6, 4))
    with pytest.raises(ValueError, match=f"{name}: expected images of 3 channels, got 1"):
        load_images(tmp_path / name, channels=3)


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4,)])
def test_a_size_that_cannot_be_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=r"size: expected \(height, width\)"):
        load_images(tmp_path, size=size)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_that_cannot_be_are_refused(tmp_path, channels):
    with pytest.raises(ValueError, match=f"channels: expected 1 or 3, got {channels}"):
        load_images(tmp_path, channels=channels)


GOOD = idx(pixels(2, 4, 6))
PACKED = gzip.compress(GOOD)
ARCHIVE = npz(images=pixels(2, 4, 6), labels=np.array([1, 2]))
MALFORMED_FILES = {
    "unknown suffix": ("a.txt", b"", "expected an .npz archive, a folder"),
    "idx: empty": (IDX, b"", "got an empty file"),
    "idx: labels for images": (IDX, idx(pixels(5)), "00000803, got 00000801"),
    "idx: of floats": (IDX, idx(pixels(2, 4, 6), bytes([0, 0, 0x0D, 3])), "got 00000d03"),
    "idx: packed but not named so": (IDX, PACKED, "got 1f8b"),
    "idx: header cut": (IDX, GOOD[:9], "truncated: expected 3 sizes of 4 bytes, got 5 bytes"),
    "idx: cut": (IDX, GOOD[:-1], "truncated: expected 48 bytes for shape (2, 4, 6), got 47"),
    "idx: too long": (IDX, GOOD + b"1", "expected the end after 48 bytes"),
    "idx: no images": (IDX, idx(pixels(0, 4, 6)), "at least one image, got shape (0, 4, 6)"),
    "idx: no pixels": (IDX, idx(pixels(2, 4, 0)), "at least one image, got shape (2, 4, 0)"),
    "idx: sizes past memory": (IDX, GOOD[:4] + b"\xff" * 12, "truncated: expected 7922816"),
    "gz: cut": (f"{IDX}.gz", PACKED[:-9], "end-of-stream marker"),
    "gz: not packed": (f"{IDX}.gz", GOOD, "Not a gzipped file"),
    "gz: checksum": (f"{IDX}.gz", PACKED[:-8] + bytes(8), "CRC check failed"),
    "gz: bad stream": (f"{IDX}.gz", PACKED[:10] + b"\xff" * 20, "invalid"),
    "npz: empty": ("a.npz", b"", "truncated or not an .npz archive"),
    "npz: a lone array": ("a.npz", b"\x93NUMPY\x01\x00", "truncated or not an .npz archive"),
    "npz: cut": ("a.npz", ARCHIVE[:-30], "truncated or not an .npz archive"),
    "npz: no images": ("a.npz", npz(labels=np.array([1])), "expected an array images"),
    "npz: objects": ("a.npz", npz(images=np.array([{}, None])), "allow_pickle=False"),
    "npz: floats": ("a.npz", npz(images=np.ones((2, 4, 6))), "images: expected uint8, got float64"),
    "npz: no image": ("a.npz", npz(images=pixels(0, 4, 6)), "got shape (0, 4, 6)"),
    "npz: no pixels": ("a.npz", npz(images=pixels(2, 0, 6)), "got shape (2, 0, 6)"),
    "npz: one image": ("a.npz", npz(images=pixels(4, 6)), "got shape (4, 6)"),
    "npz: no array": ("a.npz", npz(images=np.uint8(1)), "got shape ()"),
    "npz: channels first": ("a.npz", npz(images=pixels(2, 3, 4, 6)), "got shape (2, 3, 4, 6)"),
    "npz: few labels": (
        "a.npz",
        npz(images=pixels(2, 4, 6), labels=np.array([1])),
        "labels: expected shape (2,), got (1,)",
    ),
    "npz: label matrix": (
        "a.npz",
        npz(images=pixels(2, 4, 6), labels=np.ones((2, 1), int)),
        "labels: expected shape (2,), got (2, 1)",
    ),
    "npz: label below 0": (
        "a.npz",
        npz(images=pixels(2, 4, 6), labels=np.array([1, -2])),
        "labels: expected at least 0, got -2",
    ),
    "npz: label past int64": (
        "a.npz",
        npz(images=pixels(2, 4, 6), labels=np.array([1, 2**64 - 1], np.uint64)),
        "labels: expected at least 0, got 18446744073709551615",
    ),
    "npz: float labels": (
        "a.npz",
        npz(images=pixels(2, 4, 6), labels=np.array([1.0, 2.0])),
        "labels: expected integers, got float64",
    ),
}


@pytest.mark.parametrize(
    ("name", "data", "message"), MALFORMED_FILES.values(), ids=MALFORMED_FILES.keys()
)
def test_malformed_files_are_refused(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}"):
        load_images(path)


def test_an_archive_of_foreign_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", b"no array")
    with pytest.raises(ValueError, match=r"a\.npz: images: expected an array in \.npy format"):
        load_images(tmp_path / "a.npz")


def test_a_decoders_error_without_words_is_named(tmp_path, monkeypatch):
    def run_out(file, allow_pickle):
        raise MemoryError

    (tmp_path / "a.npz").write_bytes(ARCHIVE)
    monkeypatch.setattr(np, "load", run_out)
    with pytest.raises(ValueError, match=r"a\.npz: MemoryError$"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npz", IDX, "folder"])
def test_a_path_that_does_not_exist_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: not found"):
        load_images(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npz", IDX, f"{IDX}.gz", "a.png"])
def test_what_the_system_says_on_opening_passes_as_it_is(tmp_path, monkeypatch, name):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=re.escape(name)):
        load_images(tmp_path if name == "a.png" else tmp_path / name)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (idx(pixels(3)), "expected 2 labels, as many as images in .*, got 3"),
        (idx(pixels(0)), "expected 2 labels, as many as images in .*, got 0"),
        (idx(pixels(2, 1)), "00000801, got 00000802"),
        (idx(pixels(2))[:-1], "truncated: expected 2 bytes"),
    ],
)
def test_malformed_labels_beside_idx_images_are_refused(tmp_path, labels, message):
    (tmp_path / IDX).write_bytes(GOOD)
    (tmp_path / IDX_LABELS).write_bytes(labels)
    with pytest.raises(ValueError, match=f"{IDX_LABELS}: .*{message}"):
        load_images(tmp_path / IDX)


def test_folders_that_hold_no_set_of_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected image files \(.*\), found none$"):
        load_images(tmp_path)
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "full" / "a.png", pixels(4, 6))
    with pytest.raises(ValueError, match=r"empty: expected image files \(.*\), found none$"):
        load_images(tmp_path)
    (tmp_path / "empty" / "deeper").mkdir()
    with pytest.raises(
        ValueError, match="empty: expected image files alone, got the folder deeper"
    ):
        load_images(tmp_path)
    write_image(tmp_path / "b.png", pixels(4, 6))
    with pytest.raises(ValueError, match=r"one subfolder a class, got both \(b.png, empty\)"):
        load_images(tmp_path)


def test_a_folder_of_idx_files_asks_which(tmp_path):
    for name in (f"train-images-idx3-ubyte{suffix}" for suffix in ("", ".gz")):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"path of train-images-idx3-ubyte or train-.*\.gz$"):
        load_images(tmp_path)


def test_mixed_sizes_are_refused_without_a_size(tmp_path):
    write_image(tmp_path / "a.png", pixels(4, 6))
    write_image(tmp_path / "b.png", pixels(6, 4))
    with pytest.raises(
        ValueError, match=r"b\.png: expected 4 x 6, as .*a\.png, got 6 x 4; give a size"
    ):
        load_images(tmp_path)
    assert load_images(tmp_path, size=(4, 4)).images.shape == (2, 3, 4, 4)


def gif():
    file = io.BytesIO()
    Image.fromarray(pixels(4, 6)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", png(pixels(40, 60))[:-60], gif()],
    ids=["empty", "text", "cut", "another format under this suffix"],
)
def test_unreadable_images_are_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: (cannot identify|image file is truncated)"):
        load_images(tmp_path)


def test_sixteen_bits_a_channel_are_refused(tmp_path):
    write_image(tmp_path / "a.png", pixels(4, 6).astype(np.uint16) * 200)
    with pytest.raises(ValueError, match=r"a\.png: expected 8 bits a channel, got .* I;16"):
        load_images(tmp_path)


def test_an_image_of_absurd_size_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", pixels(40, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.png: .*decompression bomb"):
        load_images(tmp_path)


def test_folders_without_pillow_name_the_extra(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", pixels(4, 6))
    (tmp_path / "a.npz").write_bytes(ARCHIVE)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"mambaquant_ext\[vision\]"):
        load_images(tmp_path)
    assert len(load_images(tmp_path / "a.npz")) == 2


FORMATS = {
    "a.npz": ARCHIVE,
    IDX: GOOD,
    f"{IDX}.gz": PACKED,
    "folder/a.png": png(pixels(4, 6, 3)),
    "folder/a.jpg": None,
    "folder/a.bmp": None,
    "folder/a.webp": None,
}


def encoded(name):
    if FORMATS[name] is None:
        file = io.BytesIO()
        Image.fromarray(pixels(4, 6, 3)).save(
            file, {"jpg": "JPEG"}.get(name[-3:], Path(name).suffix[1:])
        )
        FORMATS[name] = file.getvalue()
    return FORMATS[name]


def loaded_or_refused(path):
    try:
        return load_images(path)
    except (ValueError, OSError) as refusal:
        return refusal


def assert_loads_or_refuses_by_name(name, data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        result = loaded_or_refused(file.parent if name.startswith("folder") else file)
        if isinstance(result, Exception):
            assert str(file) in str(result)
            return False
        assert result.images.dtype == torch.uint8
        assert result.images.dim() == 4
        assert min(result.images.shape) > 0
        assert result.labels is None or result.labels.shape == (len(result),)
        return True


names = pytest.mark.parametrize("name", FORMATS)


@names
def test_the_undamaged_file_loads(name):
    assert assert_loads_or_refuses_by_name(name, encoded(name))


@names
@given(data=st.binary(max_size=200))
@example(data=b"\x93NUMPY")
@example(data=b"PK\x05\x06" + bytes(18))
def test_random_bytes_are_refused_by_name(name, data):
    assert not assert_loads_or_refuses_by_name(name, data)


@names
@given(draw=st.data())
def test_damaged_files_load_or_are_refused_by_name(name, draw):
    data = bytearray(encoded(name))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.one_of(st.none(), st.integers(0, len(data))))
    assert_loads_or_refuses_by_name(name, bytes(data[:cut]))


def test_some_of_a_set():
    whole = ImageSet(
        images=torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2),
        labels=torch.arange(6),
        class_names=("a", "b"),
    )
    for which, expected in ((slice(2), [0, 1]), (torch.tensor([4, 1]), [4, 1])):
        part = whole[which]
        assert len(part) == 2
        assert torch.equal(part.images, whole.images[expected])
        assert part.labels.tolist() == expected
        assert part.class_names == whole.class_names
    assert ImageSet(images=whole.images)[:2].labels is None


@pytest.mark.parametrize(
    ("mean", "std"), [([0.286], [0.353]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
def test_normalise_equals_float64(mean, std):
    channels = len(mean)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    before = images.clone()
    found = normalise(images, mean, std)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    exact = (images.double() / 255 - mean) / std
    assert found.dtype == torch.float32
    bound = NORMALISED_ROUNDINGS * 2.0**-24 * (1 / std + exact.abs())
    assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(images, before)


BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("images", "mean", "std", "error", "message"),
    [
        (BYTES.float(), [0.0] * 3, [1.0] * 3, TypeError, "images: expected uint8, got float32"),
        (BYTES[0], [0.0] * 3, [1.0] * 3, ValueError, r"got shape \(3, 4, 4\)"),
        (BYTES, [0.0], [1.0] * 3, ValueError, "mean: expected 3 values, one a channel, got 1"),
        (BYTES, [0.0] * 3, [1.0] * 4, ValueError, "std: expected 3 values, one a channel, got 4"),
        (BYTES, [0.0, NAN, 0.0], [1.0] * 3, ValueError, "mean: expected finite"),
        (BYTES, [0.0, 0.0, 1e39], [1.0] * 3, ValueError, "mean: expected finite"),
        (BYTES, [0.0] * 3, [1.0, 0.0, 1.0], ValueError, "std: expected finite values above 0"),
        (BYTES, [0.0] * 3, [1.0, -1.0, 1.0], ValueError, "std: expected finite values above 0"),
        (BYTES, [0.0] * 3, [1.0, INF, 1.0], ValueError, "std: expected finite values above 0"),
        (BYTES, [0.0] * 3, [1.0, NAN, 1.0], ValueError, "std: expected finite values above 0"),
        (BYTES, [0.0] * 3, [1.0, 1e-39, 1.0], ValueError, "std: expected finite values above 0"),
    ],
)
def test_normalise_checks(images, mean, std, error, message):
    with pytest.raises(error, match=message):
        normalise(images, mean, std)


def test_the_images_of_the_small_vision_model():
    for path, count in ((fashion_mnist.TEST, 2000), (fashion_mnist.CALIBRATION, 256)):
        loaded = load_images(path, size=(28, 28), channels=1)
        assert loaded.images.shape == (count, 1, 28, 28)
        assert set(loaded.labels.tolist()) == set(range(10))


@pytest.mark.skipif(
    not fashion_mnist.FASHION_MNIST_TEST.is_file(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_the_whole_of_fashion_mnist_begins_with_the_test_images():
    whole, part = load_images(fashion_mnist.FASHION_MNIST_TEST), load_images(fashion_mnist.TEST)
    assert whole.images.shape == (10000, 1, 28, 28)
    assert torch.equal(whole.images[:2000], part.images)
    assert torch.equal(whole.labels[:2000], part.labels)
