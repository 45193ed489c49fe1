"""VMamba: a hierarchical vision model whose blocks scan an image along four routes.

Images and the classifier's result are as everywhere in torch; between them, tensors are channel-last,
(batch, height, width, hidden). The public code has a channel-first layout too ("ln2d"); it computes the same from
the same parameters.

Source: Liu et al., VMamba: Visual State Space Model (arXiv 2401.10166); parameter names of MzeroMiko/VMamba.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.vision.branches import SelectiveBranches
from mambaquant_ext.model.vision.config_fields import FieldConfig
from mambaquant_ext.model.vision.feedforward import conv_channels_last, depthwise_conv
from mambaquant_ext.model.vision.hierarchy import (
    Classifier,
    Downsample,
    PatchEmbed,
    Pyramid,
    VSSBlock,
    make_patch_embed,
    make_stages,
)

ROUTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class VMambaConfig(FieldConfig):
    """Sizes and variants of a VMamba.

    Attributes:
        depths: blocks a stage.
        dims: hidden width of each stage.
        image_channels: of the input.
        classes: of the head.
        patch_size: pixels a side of a token of the first stage; 4 with PatchEmbed.V2.
        dstate: states per channel.
        dt_rank: or None for a sixteenth of the stage's hidden width, rounded up.
        ssm_ratio: inner width over hidden width.
        conv_width: taps a side of the depthwise conv, odd.
        has_conv_bias: of the depthwise conv.
        has_gate: in_proj makes a gate z, too (the public forward types without "noz").
        mlp_ratio: inner width of the MLP over hidden width; 0 for blocks without MLP.
        patch_embed: variant.
        downsample: variant.
    """

    depths: tuple[int, ...] = (2, 2, 8, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    image_channels: int = 3
    classes: int = 1000
    patch_size: int = 4
    dstate: int = 1
    dt_rank: int | None = None
    ssm_ratio: float = 1.0
    conv_width: int = 3
    has_conv_bias: bool = False
    has_gate: bool = False
    mlp_ratio: float = 4.0
    patch_embed: PatchEmbed = PatchEmbed.V2
    downsample: Downsample = Downsample.V3

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or range, or values that exclude each other.
        """
        self.check_fields(may_be_zero=frozenset({"mlp_ratio"}))
        if len(self.dims) != len(self.depths):
            self.refuse("dims", f"as many values as depths ({len(self.depths)})")
        if self.conv_width % 2 == 0:
            self.refuse("conv_width", "an odd number")
        if self.patch_embed is PatchEmbed.V2 and self.patch_size != 4:
            self.refuse("patch_size", "4 with PatchEmbed.V2")
        if self.patch_embed is PatchEmbed.V2 and self.dims[0] % 2:
            self.refuse("dims", "an even first width with PatchEmbed.V2")


_FIRST_RELEASE = VMambaConfig(
    depths=(2, 2, 9, 2),
    dstate=16,
    ssm_ratio=2.0,
    has_conv_bias=True,
    has_gate=True,
    mlp_ratio=0.0,
    patch_embed=PatchEmbed.V1,
    downsample=Downsample.V1,
)
_BASE_DIMS = (128, 256, 512, 1024)

# The published models: s1l8 and its like as the paper names them, v0 those of the first release.
PRESETS: dict[str, VMambaConfig] = {
    "tiny-s1l8": VMambaConfig(),
    "small-s1l20": VMambaConfig(depths=(2, 2, 20, 2)),
    "base-s1l20": VMambaConfig(depths=(2, 2, 20, 2), dims=_BASE_DIMS),
    "tiny-s2l5": VMambaConfig(depths=(2, 2, 5, 2), ssm_ratio=2.0),
    "small-s2l15": VMambaConfig(depths=(2, 2, 15, 2), ssm_ratio=2.0),
    "base-s2l15": VMambaConfig(depths=(2, 2, 15, 2), ssm_ratio=2.0, dims=_BASE_DIMS),
    "tiny-v0": _FIRST_RELEASE,
    "small-v0": dataclasses.replace(_FIRST_RELEASE, depths=(2, 2, 27, 2)),
    "base-v0": dataclasses.replace(_FIRST_RELEASE, depths=(2, 2, 27, 2), dims=_BASE_DIMS),
}


def cross_scan(x: Tensor) -> Tensor:
    """The tokens of a map along the four routes: row-major, column-major, and both reversed.

    Args:
        x: (batch, height, width, dim).

    Returns:
        (routes, batch, height * width, dim).
    """
    forth = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)])
    return torch.cat([forth, forth.flip(2)])


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """The sum over the routes of cross_scan, every token back in its place.

    Args:
        y: (routes, batch, height * width, dim).
        height: of the map.
        width: of the map.

    Returns:
        (batch, height, width, dim).
    """
    forth = y[:2] + y[2:].flip(2)
    by_rows = forth[0].unflatten(1, (height, width))
    by_columns = forth[1].unflatten(1, (width, height))
    merged: Tensor = by_rows + by_columns.transpose(1, 2)
    return merged


class SS2D(SelectiveBranches):
    """VMamba's mixer: depthwise 2-D conv, SiLU, four scans with weights of their own, their sum.

    out = out_proj(out_norm(sum over routes of the scan) * silu(z)); without a gate the factor is left out.

    Attributes:
        in_proj: hidden to dim, or to 2 dim with a gate: x first, then z.
        conv2d: (dim, 1, conv_width, conv_width).
        out_norm: LayerNorm of dim.
        out_proj: dim to hidden.
    """

    def __init__(
        self,
        *,
        hidden: int,
        dim: int,
        dt_rank: int,
        dstate: int,
        conv_width: int,
        has_conv_bias: bool,
        has_gate: bool,
        branches: int = ROUTES,
    ) -> None:
        super().__init__(branches=branches, dim=dim, dt_rank=dt_rank, dstate=dstate)
        self.has_gate = has_gate
        self.in_proj = nn.Linear(hidden, 2 * dim if has_gate else dim, bias=False)
        self.conv2d = depthwise_conv(dim, conv_width, bias=has_conv_bias)
        self.out_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, hidden, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The mixer's output, without norm and residual add.

        Args:
            hidden_states: (batch, height, width, hidden).

        Returns:
            (batch, height, width, hidden).
        """
        projected: Tensor = self.in_proj(hidden_states)
        x, z = projected.chunk(2, -1) if self.has_gate else (projected, None)
        y = self.scan_map(x)
        out: Tensor = self.out_proj(y if z is None else y * F.silu(z))
        return out

    def scan_map(self, x: Tensor) -> Tensor:
        """Conv, scans, merge and norm.

        Args:
            x: (batch, height, width, dim), conv input.

        Returns:
            (batch, height, width, dim), before the gate.
        """
        x = F.silu(conv_channels_last(self.conv2d, x))
        routes = cross_scan(x)
        scanned = [self.scan_branch(branch, route) for branch, route in enumerate(routes)]
        y: Tensor = self.out_norm(cross_merge(torch.stack(scanned), x.shape[1], x.shape[2]))
        return y


class VMamba(Pyramid):
    """The classifier."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__(
            make_patch_embed(
                config.patch_embed, config.image_channels, config.dims[0], config.patch_size
            ),
            make_stages(
                config.depths, config.dims, config.downsample, partial(_make_block, config)
            ),
            Classifier(config.dims[-1], config.classes),
            config.image_channels,
            config.patch_size,
        )
        self.config = config


def _make_block(config: VMambaConfig, hidden: int) -> nn.Module:
    """A new block of a stage of width `hidden`."""
    mixer = SS2D(
        hidden=hidden,
        dim=int(config.ssm_ratio * hidden),
        dt_rank=config.dt_rank or math.ceil(hidden / 16),
        dstate=config.dstate,
        conv_width=config.conv_width,
        has_conv_bias=config.has_conv_bias,
        has_gate=config.has_gate,
    )
    return VSSBlock(hidden, mixer, int(config.mlp_ratio * hidden))


# Names of the first release, and what later checkpoints call the same.
_FIRST_NAMES = (
    ("patch_embed.proj.", "patch_embed.0."),
    ("patch_embed.norm.", "patch_embed.2."),
    ("norm.", "classifier.norm."),
    ("head.", "classifier.head."),
)
_FIRST_BLOCK_NAMES = ((".ln_1.", ".norm."), (".self_attention.", ".op."))
_LINEAR = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's parameters under the names and shapes that VMamba.load_state_dict takes.

    The first release has other names, and channel-first checkpoints may hold linear layers as 1x1 convs.

    Args:
        state: the checkpoint's parameters by name.

    Returns:
        The same tensors, linear weights as (out, in).
    """
    renamed = {}
    for name, tensor in state.items():
        key = name
        for old, new in _FIRST_NAMES:
            if key.startswith(old):
                key = new + key[len(old) :]
                break
        for old, new in _FIRST_BLOCK_NAMES:
            key = key.replace(old, new)
        renamed[key] = tensor.flatten(1) if key.endswith(_LINEAR) else tensor
    return renamed
