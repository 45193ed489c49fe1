"""Files of tensors: mapped rather than read, checksummed, and replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' names of what this package stores, and of what may surround its blocks.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_HEADER_START = 8  # behind the header's length


class CheckpointError(ValueError):
    """A folder that is not a readable checkpoint; the message names the file and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """A safetensors file as views of one memory map. Opening it reads its header and no tensor.

    Attributes:
        path: of the file.
        header: its JSON, as it stands in the file.
        metadata: of the header.
        table: dtype, shape and place of each tensor, by its name, as in the header.
        tensors: by name; private to the process: a write to one changes no file.
        memory: the map.
    """

    path: Path
    header: bytes
    metadata: dict[str, str]
    table: dict[str, Any]
    tensors: dict[str, Tensor]
    memory: mmap.mmap

    @classmethod
    def map(cls, path: Path) -> TensorFile:
        """Maps a file.

        Args:
            path: of the file.

        Raises:
            CheckpointError: missing, truncated, or not a safetensors file.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: not found")
        try:
            # Checks that the header fits the file: sizes, dtypes, no holes, no overlaps, nothing behind the end.
            with safe_open(path, framework="pt"), path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(_HEADER_START), "little"))
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file ({reason})"
            ) from None
        table = json.loads(header)
        metadata = table.pop("__metadata__", {})
        start = _HEADER_START + len(header)
        tensors = {name: _view(path, name, memory, start, entry) for name, entry in table.items()}
        return cls(
            path=path,
            header=header,
            metadata=metadata,
            table=table,
            tensors=tensors,
            memory=memory,
        )

    def expect_few_reads(self, names: Iterable[str]) -> None:
        """Tells the system that of some tensors only single rows will be asked for, if anything.

        Otherwise a byte that is read from the disk brings along what stands around it, up to megabytes.

        Args:
            names: of tensors; what stands between the first and the last of them is meant too.
        """
        offsets = [at for name in names for at in self.table[name]["data_offsets"]]
        if not offsets or not hasattr(self.memory, "madvise"):
            return
        start = _HEADER_START + len(self.header)
        begin, end = start + min(offsets), start + max(offsets)
        begin -= begin % mmap.PAGESIZE
        self.memory.madvise(mmap.MADV_RANDOM, begin, end - begin)


def _view(path: Path, name: str, memory: mmap.mmap, start: int, entry: dict[str, Any]) -> Tensor:
    """One tensor in a storage of its own, so that a copy or a pickle of it takes no other's bytes along.

    safetensors' get_tensor does the same, but looks at the first byte: with read-ahead, at most of the file.
    """
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name}: expected a dtype of {', '.join(DTYPES)}, got {entry['dtype']}"
        )
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    count, begin = math.prod(shape), start + entry["data_offsets"][0]
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)


def sha256(path: Path, before: bytes = b"", skipped: int = 0) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Args:
        path: of the file.
        before: hashed in place of its first bytes.
        skipped: how many of them.
    """
    digest = hashlib.sha256(before)
    with path.open("rb") as file:
        file.seek(skipped)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes `path`'s place if the block succeeds.

    Args:
        path: of the file to write.
    """
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
