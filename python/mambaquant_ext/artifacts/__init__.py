"""What the stages hand to each other: calibration statistics, packed models, and their files."""

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
    "LayerMoments",
    "MomentStats",
    "PackedBlock",
    "PackedHead",
    "PackedModel",
    "Range",
    "RangeStats",
]
