"""MSVMamba: VMamba with one route at full resolution and three on a map of half the sides.

Source: Shi et al., Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model (arXiv 2405.14174); parameter
names of YuHengsss/MSVMamba.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.vision.config_fields import FieldConfig
from mambaquant_ext.model.vision.feedforward import (
    ConvFFN,
    SqueezeExcitation,
    conv_channels_last,
    depthwise_conv,
)
from mambaquant_ext.model.vision.hierarchy import (
    Classifier,
    Downsample,
    PatchEmbed,
    Pyramid,
    make_patch_embed,
    make_stages,
)
from mambaquant_ext.model.vision.vmamba import SS2D, cross_merge, cross_scan

# The branches of the stacked weights, as checkpoints hold them.
COARSE, FINE = 0, 1
COARSE_STRIDE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MSVMambaConfig(FieldConfig):
    """Sizes of an MSVMamba.

    Attributes:
        depths: blocks a stage.
        dims: hidden width of each stage.
        image_channels: of the input.
        classes: of the head.
        patch_size: pixels a side of a token of the first stage.
        dstate: states per channel.
        dt_rank: or None for a sixteenth of the stage's hidden width, rounded up.
        ssm_ratio: inner width over hidden width.
        conv_width: taps a side of the full-resolution depthwise conv, odd.
        coarse_conv_width: taps a side of the depthwise conv of stride 2, odd.
        se_reduction: inner width over that of the squeeze and excitation's bottleneck.
        ffn_ratio: inner width of the ConvFFN over hidden width.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    image_channels: int = 3
    classes: int = 1000
    patch_size: int = 4
    dstate: int = 1
    dt_rank: int | None = None
    ssm_ratio: float = 2.0
    conv_width: int = 3
    coarse_conv_width: int = 7
    se_reduction: int = 8
    ffn_ratio: int = 2

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or range, or values that exclude each other.
        """
        self.check_fields()
        if len(self.dims) != len(self.depths):
            self.refuse("dims", f"as many values as depths ({len(self.depths)})")
        for name in ("conv_width", "coarse_conv_width"):
            if getattr(self, name) % 2 == 0:
                self.refuse(name, "an odd number")
        if int(self.ssm_ratio * min(self.dims)) < self.se_reduction:
            self.refuse("se_reduction", "no more than the smallest inner width")


# The published models.
PRESETS: dict[str, MSVMambaConfig] = {
    "nano": MSVMambaConfig(depths=(1, 2, 5, 2), dims=(48, 96, 192, 384)),
    "micro": MSVMambaConfig(depths=(1, 2, 5, 2), dims=(64, 128, 256, 512)),
    "tiny": MSVMambaConfig(depths=(1, 2, 9, 2), dims=(96, 192, 384, 768)),
}


def coarse_scan(x: Tensor) -> Tensor:
    """Three routes of a map in one sequence: rows reversed, columns, columns reversed.

    Args:
        x: (batch, height, width, dim).

    Returns:
        (batch, 3 * height * width, dim).
    """
    _, columns, rows_reversed, columns_reversed = cross_scan(x)
    return torch.cat([rows_reversed, columns, columns_reversed], 1)


def coarse_merge(y: Tensor, height: int, width: int) -> Tensor:
    """The sum over the routes of coarse_scan, every token back in its place.

    Args:
        y: (batch, 3 * height * width, dim).
        height: of the map.
        width: of the map.

    Returns:
        (batch, height, width, dim).
    """
    rows_reversed, columns, columns_reversed = y.chunk(3, 1)
    rows = torch.zeros_like(columns)
    return cross_merge(torch.stack([rows, columns, rows_reversed, columns_reversed]), height, width)


class MultiScaleSS2D(SS2D):
    """MSVMamba's mixer.

    The full-resolution map is scanned row by row; a map of half its sides, from a strided depthwise conv of the same
    input, along the other three routes in ONE sequence, so that a route starts from the state the last one left and
    all share the weights of branch COARSE. Each is normalised alone; the coarse sum is enlarged bilinearly.

    Attributes:
        conv2d_b1: (dim, 1, coarse_conv_width, coarse_conv_width), stride 2.
        se: squeeze and excitation of the sum, before the gate.
    """

    def __init__(
        self,
        *,
        hidden: int,
        dim: int,
        dt_rank: int,
        dstate: int,
        conv_width: int,
        coarse_conv_width: int,
        se_bottleneck: int,
    ) -> None:
        super().__init__(
            hidden=hidden,
            dim=dim,
            dt_rank=dt_rank,
            dstate=dstate,
            conv_width=conv_width,
            has_conv_bias=True,
            has_gate=True,
            branches=2,
        )
        self.conv2d_b1 = depthwise_conv(dim, coarse_conv_width, stride=COARSE_STRIDE, bias=True)
        self.se = SqueezeExcitation(dim, se_bottleneck)

    def scan_map(self, x: Tensor) -> Tensor:
        """Convs, scans, norms, merge, squeeze and excitation.

        Args:
            x: (batch, height, width, dim), conv input.

        Returns:
            (batch, height, width, dim), before the gate.
        """
        size = (x.shape[1], x.shape[2])
        fine = F.silu(conv_channels_last(self.conv2d, x))
        coarse = F.silu(conv_channels_last(self.conv2d_b1, x))
        y: Tensor = self.out_norm(self.scan_branch(FINE, fine.flatten(1, 2))).unflatten(1, size)
        y_coarse = coarse_merge(
            self.out_norm(self.scan_branch(COARSE, coarse_scan(coarse))),
            coarse.shape[1],
            coarse.shape[2],
        )
        enlarged = F.interpolate(y_coarse.permute(0, 3, 1, 2), size, mode="bilinear")
        gated: Tensor = self.se(y + enlarged.permute(0, 2, 3, 1))
        return gated


class MSVSSBlock(nn.Module):
    """x + op(norm(x)), then x + convFFN(norm2(x)).

    Attributes:
        norm: LayerNorm of hidden.
        op: the mixer.
        norm2: LayerNorm of hidden.
        convFFN: under the checkpoints' name.
    """

    def __init__(self, hidden: int, op: nn.Module, ffn_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.op = op
        self.norm2 = nn.LayerNorm(hidden)
        self.convFFN = ConvFFN(hidden, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: (batch, height, width, hidden).
        """
        x = x + self.op(self.norm(x))
        y: Tensor = x + self.convFFN(self.norm2(x))
        return y


class MSVMamba(Pyramid):
    """The classifier."""

    def __init__(self, config: MSVMambaConfig) -> None:
        super().__init__(
            make_patch_embed(
                PatchEmbed.V1, config.image_channels, config.dims[0], config.patch_size
            ),
            make_stages(config.depths, config.dims, Downsample.V1, partial(_make_block, config)),
            Classifier(config.dims[-1], config.classes),
            config.image_channels,
            config.patch_size,
        )
        self.config = config


def _make_block(config: MSVMambaConfig, hidden: int) -> nn.Module:
    """A new block of a stage of width `hidden`."""
    dim = int(config.ssm_ratio * hidden)
    mixer = MultiScaleSS2D(
        hidden=hidden,
        dim=dim,
        dt_rank=config.dt_rank or math.ceil(hidden / 16),
        dstate=config.dstate,
        conv_width=config.conv_width,
        coarse_conv_width=config.coarse_conv_width,
        se_bottleneck=dim // config.se_reduction,
    )
    return MSVSSBlock(hidden, mixer, config.ffn_ratio * hidden)
