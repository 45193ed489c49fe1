"""VMamba: four scans over one convolved image, summed and normalised before the gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts.layout import Skip
from mambaquant_ext.model.adapters.kinds import BlockKind, FamilyAdapter
from mambaquant_ext.model.reading import (
    branch_of_tensors,
    copied,
    copied_or_zeros,
    norm_weights,
    read_conv,
)
from mambaquant_ext.model.sites import ChannelsFirst, ChannelsLast, Contract
from mambaquant_ext.model.vision.vmamba import ROUTES, VMamba, VMambaConfig
from mambaquant_ext.model.weights import BranchWeights, MixerWeights
from mambaquant_ext.routes import ScanRoute, TokenOrder

ROWS, COLUMNS = TokenOrder(), TokenOrder("axes", (1, 0))
_STACKED = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
_SS2D_PARTS = ("in_proj", "conv2d", "out_norm", "out_proj", *_STACKED)


def stacked_branches(
    module: nn.Module, conv: int | None = 0, first_channel: int = 0
) -> tuple[BranchWeights, ...]:
    """The branches of stacked weights, as VMamba's family stores them.

    Args:
        module: with x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs and Ds.
        conv: see BranchWeights.
        first_channel: see BranchWeights.
    """
    x_proj, dt_proj, dt_bias, A_logs, Ds = (_tensor(module, name) for name in _STACKED)
    count, dim, _ = dt_proj.shape
    rows = A_logs.view(count, dim, -1), Ds.view(count, dim)
    return tuple(
        branch_of_tensors(
            x_proj[k], dt_proj[k], dt_bias[k], rows[0][k], rows[1][k], conv, first_channel
        )
        for k in range(count)
    )


def is_ss2d(module: nn.Module) -> bool:
    """Whether a module has the parameters of VMamba's mixer: of this package, or of code with the same names.

    Args:
        module: any.
    """
    if not all(hasattr(module, name) for name in _SS2D_PARTS):
        return False
    return len(_tensor(module, "x_proj_weight")) == ROUTES


def ss2d_contract(module: nn.Module) -> Contract:
    """Channel-last, unless the module says that it is channel-first.

    Args:
        module: see is_ss2d.
    """
    return ChannelsFirst() if getattr(module, "channel_first", False) else ChannelsLast()


def ss2d_weights(module: nn.Module) -> MixerWeights:
    """The weights of a mixer, its routes row by row, column by column, and both reversed.

    Args:
        module: see is_ss2d.

    Raises:
        ValueError: an in_proj that is neither x nor x and z.
        TypeError: parts of another kind.
    """
    in_proj, out_proj = module.get_submodule("in_proj"), module.get_submodule("out_proj")
    conv, out_norm = module.get_submodule("conv2d"), module.get_submodule("out_norm")
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv2d: expected an nn.Conv2d, got {type(conv).__name__}")
    # A channel-first model may hold a linear layer as a 1x1 convolution.
    rows, out = (copied(_tensor(part, "weight")).flatten(1) for part in (in_proj, out_proj))
    dim = conv.in_channels
    if len(rows) not in (dim, 2 * dim):
        raise ValueError(f"in_proj: expected {dim} or {2 * dim} rows, got {len(rows)}")
    bias = copied_or_zeros(_bias(in_proj), len(rows))
    has_gate = len(rows) == 2 * dim
    return MixerWeights(
        norm=None,
        in_x=rows[:dim],
        in_x_bias=bias[:dim],
        in_z=rows[dim:] if has_gate else None,
        in_z_bias=bias[dim:] if has_gate else None,
        convs=(read_conv(conv, along_route=False),),
        branches=stacked_branches(module),
        routes=tuple(
            ScanRoute(order, reverse, 2 * reverse + index)
            for reverse in (False, True)
            for index, order in enumerate((ROWS, COLUMNS))
        ),
        out_norm=norm_weights(out_norm),
        gate_scale=torch.ones(dim),
        out=out,
        out_bias=copied_or_zeros(_bias(out_proj), len(out)),
        skip=Skip.NONE,
    )


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return tensor


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


SS2D = BlockKind(is_ss2d, ss2d_contract, ss2d_weights)


class VMambaAdapter(FamilyAdapter):
    """VMamba of any of its variants."""

    name = "vmamba"
    head = "classifier.head"
    kinds = (SS2D,)
    model_class, config_class = VMamba, VMambaConfig
