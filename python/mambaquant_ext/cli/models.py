"""What a model folder holds."""

from __future__ import annotations

from pathlib import Path

from mambaquant_ext.artifacts.files import METADATA_FILE
from mambaquant_ext.artifacts.packed_image import IMAGE_GLOB


def is_quantized(folder: Path) -> bool:
    """Whether a model folder holds a quantized model."""
    return (folder / METADATA_FILE).is_file()


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights in a model folder, packed images, which hold some of them again, left out."""
    names = ("*.safetensors", "pytorch_model*.bin")
    found = {path for name in names for path in folder.glob(name)} - set(folder.glob(IMAGE_GLOB))
    return sum(path.stat().st_size for path in found)
