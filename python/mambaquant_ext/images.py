"""Images and their labels: from an .npz archive, a folder of image files, or the idx files of the MNIST family."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

CHANNELS = (1, 3)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
IDX_IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?")
IDX_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageSet:
    """Images of one size, as they are stored.

    Attributes:
        images: (count, channels, height, width), uint8.
        labels: (count,), int64, at least 0; None where the source has none.
        class_names: what the labels 0, 1, ... are called; empty where the source does not say.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many images."""
        return len(self.images)

    def __getitem__(self, which: slice | Tensor) -> ImageSet:
        """Some of the images with their labels: a slice, or a tensor of positions."""
        labels = None if self.labels is None else self.labels[which]
        return ImageSet(images=self.images[which], labels=labels, class_names=self.class_names)


def load_images(
    path: Path, size: tuple[int, int] | None = None, channels: int | None = None
) -> ImageSet:
    """Reads images and, where there are any, their labels.

    - An .npz archive: the array `images`, uint8, (count, height, width) or (count, height, width, channels), and
      perhaps `labels`, integers, (count,). Nothing in it is unpickled.
    - A folder of bmp, jpeg, png and webp files, in the order of their names; needs Pillow. If it has subfolders, each
      is a class, labelled from 0 in the order of the names. Hidden files and other suffixes are passed over.
      Transparency is dropped, a photograph's orientation tag ignored.
    - NAME-images-idx3-ubyte, with or without .gz; NAME-labels-idx1-ubyte is read if it lies beside it.

    Args:
        path: of the archive, the folder, or the idx file of the images.
        size: (height, width) of every image. Images of a folder are scaled until they cover it and their middle is
            cut out; None takes them as they are. Those of the other sources must have it already.
        channels: 1 (grey) or 3 (RGB). Images of a folder are converted; None means RGB there. Those of the other
            sources must have it already.

    Returns:
        At least one image.

    Raises:
        ValueError: a path that does not exist or is none of these; contents that are truncated, malformed, empty,
            of mixed sizes, or at odds with `size` or `channels`: the message names the file. Or a size or number of
            channels that cannot be.
        OSError: the file system refuses to open a file.
        ImportError: a folder is given and Pillow is not installed; names the extra that brings it.
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected (height, width), at least (1, 1), got {size}")
    if channels is not None and channels not in CHANNELS:
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if path.is_dir():
        return _from_folder(path, size, 3 if channels is None else channels)
    loaded = _from_file(path)
    height, width = loaded.images.shape[2:]
    if size is not None and (height, width) != tuple(size):
        raise ValueError(
            f"{path}: expected images of {size[0]} x {size[1]}, got {height} x {width}"
        )
    if channels is not None and loaded.images.shape[1] != channels:
        raise ValueError(
            f"{path}: expected images of {channels} channels, got {loaded.images.shape[1]}"
        )
    return loaded


def holds_images(path: Path) -> bool:
    """Whether load_images would take a path for images, going by what it is and its name alone."""
    is_file_of_images = path.suffix.lower() == ".npz" or IDX_IMAGES.fullmatch(path.name) is not None
    return path.is_dir() or is_file_of_images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std, channel by channel.

    Args:
        images: (count, channels, height, width), uint8.
        mean: of each channel, on the scale from 0 to 1.
        std: of each channel, above 0.

    Returns:
        (count, channels, height, width), float32, on the images' device.

    Raises:
        TypeError: images that are not uint8.
        ValueError: another shape, or a mean or std that is not one finite float32 a channel.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {str(images.dtype).removeprefix('torch.')}")
    if images.dim() != 4:
        raise ValueError(
            f"images: expected (count, channels, height, width), got shape {tuple(images.shape)}"
        )
    channels = images.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"{name}: expected {channels} values, one a channel, got {len(values)}"
            )
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=images.device) for v in (mean, std))
    if not bool(mean_.isfinite().all()):
        raise ValueError(f"mean: expected finite values, got {list(mean)}")
    if not bool(((std_ > 0) & std_.isfinite() & std_.reciprocal().isfinite()).all()):
        raise ValueError(f"std: expected finite values above 0, got {list(std)}")
    # In place: a batch is four times the size of its bytes already.
    return images.float().div_(255).sub_(mean_[:, None, None]).div_(std_[:, None, None])


def _from_file(path: Path) -> ImageSet:
    if not path.exists():
        raise ValueError(f"{path}: not found; expected an .npz archive, a folder or an idx3 file")
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    if IDX_IMAGES.fullmatch(path.name):
        return _from_idx(path)
    raise ValueError(
        f"{path}: expected an .npz archive, a folder of image files or NAME-images-idx3-ubyte[.gz]"
    )


@contextmanager
def _decoding(path: Path) -> Iterator[BinaryIO]:
    """An open file whose contents may be anything: what its decoder raises becomes a ValueError with the path.

    zipfile, gzip, NumPy and Pillow raise a dozen kinds between them on damaged files, from struct.error to
    NotImplementedError, and document few. What the system says on opening passes as it is.
    """
    with path.open("rb") as file:
        try:
            yield file
        except Exception as error:
            raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def _from_npz(path: Path) -> ImageSet:
    arrays = _read_npz(path, ("images", "labels"))
    if "images" not in arrays:
        raise ValueError(f"{path}: expected an array images, found none")
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images: expected uint8, got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in CHANNELS or 0 in images.shape:
        raise ValueError(
            f"{path}: images: expected (count, height, width) or (count, height, width, channels) with 1 or 3 channels "
            f"and at least one image, got shape {arrays['images'].shape}"
        )
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    labels = arrays.get("labels")
    return ImageSet(
        images=torch.from_numpy(channels_first),
        labels=None if labels is None else _npz_labels(labels, len(images), path),
    )


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named arrays that the archive has."""
    with _decoding(path) as file:
        if not zipfile.is_zipfile(file):  # np.load would take it for a pickle
            raise ValueError("truncated or not an .npz archive")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive.files}
    for name, array in arrays.items():
        # NumPy hands over the bare bytes of a file that is none of its own.
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path}: {name}: expected an array in .npy format")
    return arrays


def _npz_labels(labels: np.ndarray[Any, Any], count: int, path: Path) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels: expected integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{path}: labels: expected shape ({count},), got {labels.shape}")
    converted = torch.from_numpy(labels.astype(np.int64))
    if bool((converted < 0).any()):  # or of uint64 and past the range of int64
        raise ValueError(
            f"{path}: labels: expected at least 0, got {labels[converted.numpy() < 0][0]}"
        )
    return converted


def _from_idx(path: Path) -> ImageSet:
    images = _read_idx(path, 3)
    if images.numel() == 0:
        raise ValueError(f"{path}: expected at least one image, got shape {tuple(images.shape)}")
    labels_path = _labels_beside(path)
    labels = None if labels_path is None else _read_idx(labels_path, 1).long()
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"{labels_path}: expected {len(images)} labels, as many as images in {path}, got {len(labels)}"
        )
    return ImageSet(images=images[:, None], labels=labels)


def _labels_beside(path: Path) -> Path | None:
    """The file of the labels, packed as that of the images if both kinds are there."""
    name = IDX_IMAGES.fullmatch(path.name)
    assert name is not None
    plain = f"{name[1]}labels{name[2]}idx1-ubyte"
    choices = (f"{plain}.gz", plain) if name[3] else (plain, f"{plain}.gz")
    return next((path.parent / c for c in choices if (path.parent / c).is_file()), None)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """A file of unsigned bytes with that many dimensions."""
    with _decoding(path) as file:
        if path.suffix != ".gz":
            return _parse_idx(file, dimensions)
        with gzip.GzipFile(fileobj=file) as unpacked:
            return _parse_idx(unpacked, dimensions)


def _parse_idx(file: BinaryIO | gzip.GzipFile, dimensions: int) -> Tensor:
    """Magic (0, 0, type of the elements, dimensions), the sizes as big-endian uint32, the elements."""
    magic = bytes([0, 0, IDX_UNSIGNED_BYTE, dimensions])
    found = bytes(_read_up_to(file, 4))
    if found != magic:
        raise ValueError(
            f"expected idx data of unsigned bytes in {dimensions} dimensions, which begin with {magic.hex()}, "
            f"got {found.hex() or 'an empty file'}"
        )
    header = _read_up_to(file, 4 * dimensions)
    if len(header) < 4 * dimensions:
        raise ValueError(
            f"truncated: expected {dimensions} sizes of 4 bytes, got {len(header)} bytes"
        )
    shape = struct.unpack(f">{dimensions}I", header)
    expected = math.prod(shape)
    elements = _read_up_to(file, expected)
    if len(elements) < expected:
        raise ValueError(
            f"truncated: expected {expected} bytes for shape {shape}, got {len(elements)}"
        )
    if file.read(1):
        raise ValueError(f"expected the end after {expected} bytes for shape {shape}, got more")
    if expected == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(elements, dtype=torch.uint8).view(shape)


def _read_up_to(file: BinaryIO | gzip.GzipFile, size: int) -> bytearray:
    """Reads in pieces: a damaged header may ask for more than there is memory."""
    data = bytearray()
    while len(data) < size and (piece := file.read(min(size - len(data), 1 << 20))):
        data += piece
    return data


def _from_folder(folder: Path, size: tuple[int, int] | None, channels: int) -> ImageSet:
    files, labels, class_names = _files_of(folder)
    images = torch.empty(0)
    for index, file in enumerate(files):
        image = _read_image_file(file, size, channels)
        if index == 0:
            images = image.new_empty(len(files), *image.shape)
        elif image.shape != images.shape[1:]:
            height, width = image.shape[1:]
            raise ValueError(
                f"{file}: expected {images.shape[2]} x {images.shape[3]}, as {files[0]}, got {height} x {width}; "
                "give a size to have images of mixed sizes scaled"
            )
        images[index] = image
    return ImageSet(
        images=images,
        labels=torch.tensor(labels, dtype=torch.int64) if class_names else None,
        class_names=class_names,
    )


def _files_of(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Image files with the index of the subfolder of each, and the subfolders' names."""
    files, subfolders = _listing(folder)
    if files and subfolders:
        raise ValueError(
            f"{folder}: expected image files or one subfolder a class, got both ({files[0].name}, {subfolders[0].name})"
        )
    if not subfolders:
        _expect_files(folder, files)
        return files, [0] * len(files), ()
    labels: list[int] = []
    for label, subfolder in enumerate(subfolders):
        own, deeper = _listing(subfolder)
        if deeper:
            raise ValueError(
                f"{subfolder}: expected image files alone, got the folder {deeper[0].name}"
            )
        _expect_files(subfolder, own)
        files += own
        labels += [label] * len(own)
    return files, labels, tuple(subfolder.name for subfolder in subfolders)


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files and subfolders, sorted."""
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]
    return files, [path for path in shown if path.is_dir()]


def _expect_files(folder: Path, files: list[Path]) -> None:
    if files:
        return
    idx = sorted(path.name for path in folder.iterdir() if IDX_IMAGES.fullmatch(path.name))
    hint = (
        f"; its idx files are read one at a time: give the path of {' or '.join(idx)}"
        if idx
        else ""
    )
    raise ValueError(f"{folder}: expected image files ({', '.join(SUFFIXES)}), found none{hint}")


def _read_image_file(path: Path, size: tuple[int, int] | None, channels: int) -> Tensor:
    """(channels, height, width), uint8."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "folders of images need Pillow: pip install 'mambaquant_ext[vision]'"
        ) from error
    # Only these formats, whatever the suffix says: among Pillow's others are some that start programs.
    with _decoding(path) as file, Image.open(file, formats=FORMATS) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"expected 8 bits a channel, got Pillow's mode {image.mode}")
        converted = image.convert("L" if channels == 1 else "RGB")
        if size is not None:
            converted = ImageOps.fit(converted, (size[1], size[0]), Image.Resampling.BICUBIC)
        pixels = np.array(converted)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
