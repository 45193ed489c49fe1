"""What a model folder holds."""

from __future__ import annotations

from pathlib import Path

from mambaquant_ext.artifacts.files import METADATA_FILE


def is_quantized(folder: Path) -> bool:
    """Whether a model folder holds a quantized model."""
    return (folder / METADATA_FILE).is_file()


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    names = ("*.safetensors", "pytorch_model*.bin")
    return sum(path.stat().st_size for name in names for path in folder.glob(name))
