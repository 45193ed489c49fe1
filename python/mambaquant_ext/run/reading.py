"""What both executors read of a packed block."""

from __future__ import annotations

from torch import Tensor

from mambaquant_ext.artifacts import NormKind, PackedBlock
from mambaquant_ext.artifacts.layout import BranchLayout
from mambaquant_ext.model import NormWeights


def norm_before(block: PackedBlock) -> NormWeights | None:
    """The norm in front of in_proj, or None.

    Args:
        block: packed.
    """
    layout = block.layout
    return _norm(layout.norm, block.norm_weight, block.norm_bias, layout.norm_eps)


def norm_behind(block: PackedBlock) -> NormWeights | None:
    """The norm between merge and gate, or None.

    Args:
        block: packed.
    """
    layout = block.layout
    return _norm(layout.out_norm, block.out_norm_weight, block.out_norm_bias, layout.out_norm_eps)


def x_scale_of(block: PackedBlock, branch: BranchLayout) -> Tensor:
    """The scales of what a branch scans.

    Args:
        block: packed.
        branch: of the block.

    Returns:
        (branch's dim,), float32.
    """
    scale = block.xz_scale if branch.conv is None else block.convs[branch.conv].x_scale
    return scale[branch.first_channel : branch.first_channel + branch.dim]


def _norm(
    kind: NormKind | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> NormWeights | None:
    if kind is None:
        return None
    assert weight is not None and bias is not None
    return NormWeights(kind=kind, weight=weight, bias=bias, eps=eps)
