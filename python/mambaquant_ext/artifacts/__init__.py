"""What the stages hand to each other: calibration statistics, packed models, and their files."""

from mambaquant_ext.artifacts.files import CheckpointError, load_packed, read_metadata, save_packed
from mambaquant_ext.artifacts.packed import (
    BlockOptions,
    BlockSizes,
    PackedBlock,
    PackedHead,
    PackedModel,
)
from mambaquant_ext.artifacts.stats import LayerMoments, MomentStats, Range, RangeStats

__all__ = [
    "BlockOptions",
    "BlockSizes",
    "CheckpointError",
    "LayerMoments",
    "MomentStats",
    "PackedBlock",
    "PackedHead",
    "PackedModel",
    "Range",
    "RangeStats",
    "load_packed",
    "read_metadata",
    "save_packed",
]
