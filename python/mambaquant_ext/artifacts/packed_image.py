"""A packed image: the matrices of a checkpoint as the kernels of one instruction set read them, ready to be mapped.

packed-<isa>.safetensors stands beside model.safetensors, which it was made from and whose checksum it names. Everything
in its header follows from the checkpoint and the kernels, so that all of it is compared and nothing in it is believed.
docs/design/0014 says what is checked when.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext._load import GemmPacking, packed_gemm_weight_bytes
from mambaquant_ext.artifacts.packed import GemmSource, KernelWeight
from mambaquant_ext.artifacts.tensor_file import CheckpointError, TensorFile, replacing, sha256

IMAGE_FORMAT, IMAGE_VERSION = "mambaquant-packed", 1
_PREFIX, _SUFFIX = "packed-", ".safetensors"
IMAGE_GLOB = f"{_PREFIX}*{_SUFFIX}"
# Of the first weight. The sizes of the others keep them on cache lines of 64 bytes.
ALIGNMENT = 4096
_CHECKSUM, _NO_CHECKSUM = "sha256", "0" * 64
_ACC_OFFSET = ".acc_offset"


def image_path(folder: Path, isa: str) -> Path:
    """Where a checkpoint's image for an instruction set stands.

    Args:
        folder: of the checkpoint.
        isa: name of the instruction set.
    """
    return folder / f"{_PREFIX}{isa}{_SUFFIX}"


def images_in(folder: Path) -> list[str]:
    """Instruction sets that a checkpoint has images for, whatever their state.

    Args:
        folder: of the checkpoint.
    """
    names = sorted(path.name for path in folder.glob(IMAGE_GLOB))
    return [name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedImage:
    """An image that fits the kernels in use and the checkpoint beside it.

    Attributes:
        file: mapped.
        packing: of the kernels that read it.
    """

    file: TensorFile
    packing: GemmPacking

    def check_sha256(self) -> None:
        """Reads the whole file and compares its checksum.

        Raises:
            CheckpointError: another one; the message says what to do.
        """
        recorded = self.file.metadata[_CHECKSUM]
        found = _image_sha256(self.file.path, recorded)
        if found != recorded:
            raise _refused(
                self.file.path,
                f"expected SHA-256 {recorded}, got {found}; the file was changed after it was written",
            )

    def kernel_weights(self, sources: Iterable[GemmSource]) -> dict[str, KernelWeight]:
        """The weights, as views of the file; none is read.

        Args:
            sources: all matrices of the checkpoint.

        Raises:
            CheckpointError: the file does not hold exactly these matrices, of these sizes.
        """
        sources = list(sources)
        _check_table(self.file, _table(sources))
        tensors, layout = self.file.tensors, self.packing.layout
        return {
            source.name: KernelWeight(
                packed=tensors[source.name],
                layout=layout,
                acc_offset=tensors.get(source.name + _ACC_OFFSET),
            )
            for source in sources
        }


def write_image(
    folder: Path,
    packing: GemmPacking,
    tensors_sha256: str,
    sources: Iterable[GemmSource],
    pack: Callable[[GemmSource], KernelWeight],
) -> Path:
    """Writes an image, under a temporary name first, so that there is never half of one.

    Args:
        folder: of the checkpoint.
        packing: of the kernels in use.
        tensors_sha256: checksum of the tensor file that the matrices are from.
        sources: all matrices of the checkpoint.
        pack: lays one out for the kernels in use; called once for each, and nothing is kept of it but its acc_offset.

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be written.
    """
    path = image_path(folder, packing.isa)
    sources = list(sources)
    with replacing(path) as temporary:
        header = _header(packing, tensors_sha256, _table(sources))
        with temporary.open("wb") as file:
            file.write(header)
            offsets = []
            for source in sources:
                made = pack(source)
                file.write(_bytes(made.packed))
                if made.acc_offset is not None:
                    offsets.append(made.acc_offset)
            for acc_offset in offsets:
                file.write(_bytes(acc_offset))
        checksum = sha256(temporary).encode()
        with temporary.open("r+b") as file:
            file.write(_with_checksum(header, _NO_CHECKSUM.encode(), checksum))
    return path


def open_image(folder: Path, packing: GemmPacking, tensors_sha256: str) -> PackedImage | None:
    """The image of a checkpoint for the kernels in use.

    Args:
        folder: of the checkpoint.
        packing: of the kernels in use.
        tensors_sha256: checksum of the checkpoint's tensor file.

    Returns:
        None where there is none, or only that of another version of the kernels.

    Raises:
        CheckpointError: a truncated or foreign file, or one that was made from other tensors.
    """
    path = image_path(folder, packing.isa)
    if not path.exists():
        return None
    try:
        file = TensorFile.map(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from None
    _check(file, "format", IMAGE_FORMAT)
    versions = [_number(file, name) for name in ("format_version", "layout", "packing_version")]
    if versions != [IMAGE_VERSION, packing.layout, packing.version]:
        return None
    _check(file, "isa", packing.isa)
    _check(file, "tensors_sha256", tensors_sha256)
    known = set(_metadata(packing, tensors_sha256))
    for name in sorted(known ^ set(file.metadata)):
        raise _refused(path, f"{name}: {'missing' if name in known else 'unknown field'}")
    return PackedImage(file=file, packing=packing)


def _table(sources: list[GemmSource]) -> dict[str, Any]:
    """The header's entries: the weights in order of use, then the small tensors."""
    table: dict[str, Any] = {}
    end = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal end
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size

    for source in sources:
        size = packed_gemm_weight_bytes(*source.weight.shape)
        add(source.name, "I8", (size,), size)
    for source in sources:
        if source.zero_point is not None:
            rows = source.weight.shape[0]
            add(source.name + _ACC_OFFSET, "I32", (rows,), rows * torch.int32.itemsize)
    return table


def _metadata(packing: GemmPacking, tensors_sha256: str) -> dict[str, str]:
    return {
        "format": IMAGE_FORMAT,
        "format_version": str(IMAGE_VERSION),
        "isa": packing.isa,
        "layout": str(packing.layout),
        "packing_version": str(packing.version),
        "tensors_sha256": tensors_sha256,
        _CHECKSUM: _NO_CHECKSUM,
    }


def _header(packing: GemmPacking, tensors_sha256: str, table: Mapping[str, Any]) -> bytes:
    """The file up to its first tensor, with a checksum of zeros."""
    metadata = _metadata(packing, tensors_sha256)
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    length_bytes = 8
    padding = -(length_bytes + len(text)) % ALIGNMENT
    return (len(text) + padding).to_bytes(length_bytes, "little") + text + b" " * padding


def _with_checksum(header: bytes, before: bytes, after: bytes) -> bytes:
    field = f'"{_CHECKSUM}":"'.encode()
    return header.replace(field + before, field + after, 1)


def _image_sha256(path: Path, recorded: str) -> str:
    """SHA-256 of the file as it was before its own checksum was filled in."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    blank = length + _with_checksum(header, recorded.encode(), _NO_CHECKSUM.encode())
    return sha256(path, before=blank, skipped=len(length) + len(header))


def _bytes(tensor: Tensor) -> Any:
    return tensor.numpy().data  # the whole of a contiguous array, as a buffer


def _check_table(file: TensorFile, expected: Mapping[str, Any]) -> None:
    for name in sorted(set(file.table) - set(expected)):
        raise _refused(file.path, f"unknown tensor {name}")
    for name, entry in expected.items():
        if file.table.get(name) != entry:
            raise _refused(
                file.path, f"tensor {name}: expected {entry}, got {file.table.get(name)}"
            )


def _check(file: TensorFile, name: str, expected: str) -> None:
    found = file.metadata.get(name)
    if found != expected:
        raise _refused(file.path, f"{name}: expected {expected!r}, got {found!r}")


def _number(file: TensorFile, name: str) -> int:
    text = file.metadata.get(name, "")
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(2**63)):
        raise _refused(file.path, f"{name}: expected a number, got {text!r}")
    return int(text)


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"`mambaquant pack {path.parent}` makes it again, and without it the model loads as well"
