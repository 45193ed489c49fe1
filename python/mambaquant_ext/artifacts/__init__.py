"""What the stages hand to each other: calibration statistics, packed models, and their files."""

from mambaquant_ext.artifacts.files import load_packed, read_metadata, save_packed
from mambaquant_ext.artifacts.layout import (
    BlockLayout,
    BranchLayout,
    ConvLayout,
    Merge,
    NormKind,
    Skip,
    StreamWrite,
)
from mambaquant_ext.artifacts.packed import (
    GemmSource,
    KernelWeight,
    PackedBlock,
    PackedBranch,
    PackedConv,
    PackedHead,
    PackedLinear,
    PackedModel,
)
from mambaquant_ext.artifacts.stats import (
    BranchMoments,
    LayerMoments,
    MomentStats,
    Range,
    RangeStats,
)
from mambaquant_ext.artifacts.tensor_file import CheckpointError

__all__ = [
    "BlockLayout",
    "BranchLayout",
    "BranchMoments",
    "CheckpointError",
    "ConvLayout",
    "GemmSource",
    "KernelWeight",
    "LayerMoments",
    "Merge",
    "MomentStats",
    "NormKind",
    "PackedBlock",
    "PackedBranch",
    "PackedConv",
    "PackedHead",
    "PackedLinear",
    "PackedModel",
    "Range",
    "RangeStats",
    "Skip",
    "StreamWrite",
    "load_packed",
    "read_metadata",
    "save_packed",
]
