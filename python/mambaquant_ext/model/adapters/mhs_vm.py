"""MHS-VM: heads on parts of the channels, each along four routes, gated by how much these differ."""

from __future__ import annotations

import torch
from torch import nn

from mambaquant_ext.artifacts.layout import Merge, Skip
from mambaquant_ext.model.adapters.kinds import BlockKind, FamilyAdapter
from mambaquant_ext.model.adapters.vmamba import COLUMNS, ROWS, stacked_branches
from mambaquant_ext.model.reading import copied, norm_weights
from mambaquant_ext.model.sites import ChannelsLast
from mambaquant_ext.model.vision.mhs_vm import MHSConfig, MHSUNet
from mambaquant_ext.model.vision.multi_head_scan import MultiHeadScan, Pattern
from mambaquant_ext.model.weights import BranchWeights, MixerWeights
from mambaquant_ext.routes import ScanRoute, TokenOrder

# The two walks of each pattern, as multi_head_scan.pattern_orders makes them.
_WALKS = {
    Pattern.C: (TokenOrder("snake_rows"), TokenOrder("snake_columns")),
    Pattern.X: (TokenOrder("diagonal"), TokenOrder("diagonal_mirrored")),
    Pattern.S: (TokenOrder("spiral"), TokenOrder("spiral_mirrored")),
    Pattern.Z: (ROWS, COLUMNS),
}


def multi_head_weights(module: nn.Module) -> MixerWeights:
    """The weights of a multi-head scan, which is the block: what is around it stays in float.

    Args:
        module: MultiHeadScan.

    Raises:
        ValueError: a module without a projection behind its heads, or heads with several thresholds.
    """
    assert isinstance(module, MultiHeadScan)
    if not module.has_projection:
        raise ValueError(
            "expected a multi-head scan with cat_norm and y_proj behind its heads, got has_projection=False"
        )
    thresholds = {head.esfusion.threshold for head in module.heads}
    if len(thresholds) != 1:
        raise ValueError(f"expected one threshold for all heads, got {sorted(thresholds)}")
    in_x, out = copied(module.x_ssproj.weight), copied(module.y_proj.weight)
    branches: list[BranchWeights] = []
    routes: list[ScanRoute] = []
    first_channel = 0
    for pattern, head in zip(module.patterns, module.heads, strict=True):
        for order in _WALKS[pattern]:
            for reverse in (False, True):
                routes.append(ScanRoute(order, reverse, len(routes)))
        branches += stacked_branches(head.mambaeng, conv=None, first_channel=first_channel)
        first_channel += head.mambaeng.dim
    return MixerWeights(
        norm=None,
        in_x=in_x,
        in_x_bias=torch.zeros(len(in_x)),
        in_z=None,
        in_z_bias=None,
        convs=(),
        branches=tuple(branches),
        routes=tuple(routes),
        merge=Merge.VARIATION,
        merge_threshold=thresholds.pop(),
        out_norm=norm_weights(module.cat_norm),
        gate_scale=torch.ones(len(in_x)),
        out=out,
        out_bias=torch.zeros(len(out)),
        skip=Skip.NONE,
    )


MULTI_HEAD_SCAN = BlockKind(
    lambda module: isinstance(module, MultiHeadScan), lambda _: ChannelsLast(), multi_head_weights
)


class MHSAdapter(FamilyAdapter):
    """MHS-VM whose heads have a projection behind them. Its last layer is a convolution: there is no head."""

    name = "mhs_vm"
    kinds = (MULTI_HEAD_SCAN,)
    model_class, config_class = MHSUNet, MHSConfig
