"""A small 3-D U-Net with Mamba layers at its bottleneck or after every encoder stage.

Features are channel-first, (batch, channels, depth, height, width); a Mamba layer sees them as sequences of voxels in
row-major order.

Source: Ma et al., U-Mamba (arXiv 2401.04722), parameter names of bowang-lab/U-Mamba with one residual block a stage;
Tang et al., MambaMIM (arXiv 2408.08070), whose bottleneck is mambamim.py.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.vision.config_fields import FieldConfig
from mambaquant_ext.model.vision.mamba_mixer import MambaLayer
from mambaquant_ext.model.vision.mambamim import MambaBottleneck

NEGATIVE_SLOPE = 0.01


class Placement(str, enum.Enum):
    """Where the Mamba layers are.

    BOTTLENECK is UMambaBot, one layer after the deepest stage; ENCODER is UMambaEnc, one after every stage; MIM is
    MambaMIM's hybrid: residual blocks with an MLP and position embeddings after the deepest stage.
    """

    BOTTLENECK = "bottleneck"
    ENCODER = "encoder"
    MIM = "mim"


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig(FieldConfig):
    """Sizes and variants of a U-Net.

    Attributes:
        features: channels of each stage; a multiple of 6 in the last with Placement.MIM.
        strides: of each stage's first conv, the same on every axis.
        image_size: voxels a side, three of them, each divisible by the product of the strides.
        image_channels: of the input.
        classes: of the output.
        placement: of the Mamba layers.
        dstate: states per channel.
        conv_width: taps of the causal conv.
        expand: inner width of the mixer over its hidden width.
        mim_depth: blocks of the bottleneck with Placement.MIM.
    """

    features: tuple[int, ...] = (16, 32, 64)
    strides: tuple[int, ...] = (1, 2, 2)
    image_size: tuple[int, ...] = (32, 32, 32)
    image_channels: int = 1
    classes: int = 2
    placement: Placement = Placement.BOTTLENECK
    dstate: int = 16
    conv_width: int = 4
    expand: int = 2
    mim_depth: int = 2

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or range, or values that exclude each other.
        """
        self.check_fields()
        if len(self.features) < 2:
            self.refuse("features", "two stages or more")
        if len(self.strides) != len(self.features):
            self.refuse("strides", f"as many values as features ({len(self.features)})")
        if len(self.image_size) != 3:
            self.refuse("image_size", "three sides")
        step = math.prod(self.strides)
        if any(side % step for side in self.image_size):
            self.refuse("image_size", f"multiples of the product of the strides ({step})")
        if self.placement is Placement.MIM and self.features[-1] % 6:
            self.refuse("features", "a multiple of 6 in the last stage with Placement.MIM")

    def map_size(self, stage: int) -> tuple[int, ...]:
        """Voxels a side after a stage.

        Args:
            stage: from 0.
        """
        step = math.prod(self.strides[: stage + 1])
        return tuple(side // step for side in self.image_size)


class ResidualBlock(nn.Module):
    """act(norm2(conv2(act(norm1(conv1(x))))) + conv3(x)), act a leaky ReLU.

    Attributes:
        conv1, conv2: 3x3x3, the first with the stride.
        conv3: 1x1x1, with the stride.
        norm1, norm2: InstanceNorm with weights.
    """

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, out, 3, stride=stride, padding=1)
        self.norm1 = nn.InstanceNorm3d(out, affine=True)
        self.conv2 = nn.Conv3d(out, out, 3, padding=1)
        self.norm2 = nn.InstanceNorm3d(out, affine=True)
        self.conv3 = nn.Conv3d(channels, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: (batch, channels, depth, height, width).
        """
        y = F.leaky_relu(self.norm1(self.conv1(x)), NEGATIVE_SLOPE)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.conv3(x), NEGATIVE_SLOPE)


class Encoder(nn.Module):
    """A stem, then stages, each with a Mamba layer after it where there are some.

    Attributes:
        stem: one residual block at full resolution.
        stages: one residual block each.
        mamba_layers: one a stage, or absent.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.has_layers = config.placement is Placement.ENCODER
        self.stem = nn.Sequential(ResidualBlock(config.image_channels, config.features[0]))
        inputs = (config.features[0], *config.features)
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(channels, out, stride))
            for channels, out, stride in zip(inputs, config.features, config.strides, strict=False)
        )
        if self.has_layers:
            self.mamba_layers = nn.ModuleList(
                self.make_layer(config, stage) for stage in range(len(config.features))
            )

    @staticmethod
    def make_layer(config: UNetConfig, stage: int) -> MambaLayer:
        """The Mamba layer after a stage.

        Args:
            config: of the model.
            stage: from 0.
        """
        voxels, channels = math.prod(config.map_size(stage)), config.features[stage]
        return MambaLayer(
            min(voxels, channels),
            dstate=config.dstate,
            conv_width=config.conv_width,
            expand=config.expand,
            channel_token=voxels <= channels,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The map after each stage.

        Args:
            x: (batch, image_channels, depth, height, width).
        """
        x = self.stem(x)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if self.has_layers:
                x = self.mamba_layers[index](x)
            maps.append(x)
        return maps


class Upsample(nn.Module):
    """Nearest neighbour, then a 1x1x1 conv.

    Attributes:
        conv: channels to out.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The larger map.

        Args:
            x: (batch, channels, depth, height, width).
        """
        y: Tensor = self.conv(F.interpolate(x, scale_factor=self.stride, mode="nearest"))
        return y


class Decoder(nn.Module):
    """From the deepest map upwards, each time joined with the encoder's map of that size.

    Attributes:
        upsample_layers: the deepest first.
        stages: one residual block each.
        seg_layers: 1x1x1 convs to the classes; only training reads any but the last.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        deepest_first = list(reversed(config.features))
        self.upsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.seg_layers = nn.ModuleList()
        for below, skip, stride in zip(
            deepest_first, deepest_first[1:], reversed(config.strides), strict=False
        ):
            self.upsample_layers.append(Upsample(below, skip, stride))
            self.stages.append(nn.Sequential(ResidualBlock(2 * skip, skip)))
            self.seg_layers.append(nn.Conv3d(skip, config.classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits of every voxel.

        Args:
            maps: of the encoder, (batch, channels, depth, height, width) each, the deepest last.
        """
        x = maps[-1]
        for upsample, stage, skip in zip(
            self.upsample_layers, self.stages, reversed(maps[:-1]), strict=True
        ):
            x = stage(torch.cat([upsample(x), skip], 1))
        logits: Tensor = self.seg_layers[-1](x)
        return logits


class MambaUNet(nn.Module):
    """Encoder, Mamba layers, decoder.

    Attributes:
        encoder: with the Mamba layers of Placement.ENCODER.
        mamba_layer: with Placement.BOTTLENECK.
        mae: with Placement.MIM, under MambaMIM's name.
        decoder: to logits.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        deepest, mixer = config.features[-1], (config.dstate, config.conv_width, config.expand)
        if config.placement is Placement.BOTTLENECK:
            self.mamba_layer = MambaLayer(
                deepest, dstate=mixer[0], conv_width=mixer[1], expand=mixer[2]
            )
        elif config.placement is Placement.MIM:
            size = config.map_size(len(config.features) - 1)
            self.mae = MambaBottleneck(deepest, size, config.mim_depth, *mixer)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every voxel.

        Args:
            images: (batch, image_channels, *image_size).

        Returns:
            (batch, classes, *map_size(0)).

        Raises:
            ValueError: images of another shape.
        """
        expected = (self.config.image_channels, *self.config.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: expected (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}"
            )
        maps = self.encoder(images)
        if self.config.placement is Placement.BOTTLENECK:
            maps[-1] = self.mamba_layer(maps[-1])
        elif self.config.placement is Placement.MIM:
            maps[-1] = self.mae(maps[-1])
        logits: Tensor = self.decoder(maps)
        return logits
