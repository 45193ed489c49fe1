"""The frame of VMamba and its kin: patch embedding, stages of blocks, downsampling, classifier.

Tensors are channel-last, (batch, height, width, hidden).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.vision.feedforward import Mlp


class PatchEmbed(str, enum.Enum):
    """How an image becomes tokens: V1 one strided conv and a LayerNorm, V2 two 3x3 convs of stride 2."""

    V1 = "v1"
    V2 = "v2"


class Downsample(str, enum.Enum):
    """How a stage halves the map: V1 concatenates 2x2 tokens, V2 has a 2x2 conv, V3 a 3x3 conv of stride 2."""

    V1 = "v1"
    V2 = "v2"
    V3 = "v3"


class VSSBlock(nn.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)) where there is an MLP.

    Attributes:
        norm: LayerNorm of hidden.
        op: the mixer.
        norm2: LayerNorm of hidden, or absent.
        mlp: or absent.
    """

    def __init__(self, hidden: int, op: nn.Module, mlp_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.op = op
        self.has_mlp = mlp_dim > 0
        if self.has_mlp:
            self.norm2 = nn.LayerNorm(hidden)
            self.mlp = Mlp(hidden, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: (batch, height, width, hidden).
        """
        x = x + self.op(self.norm(x))
        return x + self.mlp(self.norm2(x)) if self.has_mlp else x


class Permute(nn.Module):
    """A permutation of the axes, in its place in a Sequential whose positions name parameters."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """The permuted tensor.

        Args:
            x: (...), as many axes as the permutation.
        """
        return x.permute(self.axes)


class PatchMerging(nn.Module):
    """Downsample.V1: the four tokens of a 2x2 square as one, normalised, then reduced.

    Attributes:
        norm: LayerNorm of 4 hidden.
        reduction: 4 hidden to out.
    """

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * hidden, out, bias=False)
        self.norm = nn.LayerNorm(4 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The smaller map; an odd side is first padded with zeros.

        Args:
            x: (batch, height, width, hidden).

        Returns:
            (batch, ceil(height / 2), ceil(width / 2), out).
        """
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        squares = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        y: Tensor = self.reduction(self.norm(torch.cat(squares, -1)))
        return y


class Stage(nn.Module):
    """Blocks, and the downsampling after them.

    Attributes:
        blocks: Sequential.
        downsample: or Identity in the last stage.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """The next stage's input.

        Args:
            x: (batch, height, width, hidden).
        """
        y: Tensor = self.downsample(self.blocks(x))
        return y


class Classifier(nn.Module):
    """Norm, mean over the map, linear head.

    Attributes:
        norm: LayerNorm of hidden.
        head: hidden to classes, with bias.
    """

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits.

        Args:
            x: (batch, height, width, hidden).

        Returns:
            (batch, classes).
        """
        logits: Tensor = self.head(self.norm(x).mean((1, 2)))
        return logits


class Pyramid(nn.Module):
    """Patch embedding, stages, classifier. A model for inference: no dropout, no stochastic depth.

    Attributes:
        patch_embed: Sequential.
        layers: the stages.
        classifier: norm and head.
    """

    def __init__(
        self,
        patch_embed: nn.Sequential,
        layers: nn.ModuleList,
        classifier: Classifier,
        image_channels: int,
        smallest_side: int,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.layers = layers
        self.classifier = classifier
        self._image_channels = image_channels
        self._smallest_side = smallest_side

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: (batch, image_channels, height, width), each side at least a patch.

        Returns:
            (batch, classes).

        Raises:
            ValueError: images of another shape.
        """
        check_images(images, self._image_channels, self._smallest_side)
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        logits: Tensor = self.classifier(x)
        return logits


def check_images(images: Tensor, channels: int, side: int) -> None:
    """Refuses what is no batch of images.

    Args:
        images: (batch, channels, height, width).
        channels: expected.
        side: least height and width.

    Raises:
        ValueError: another shape.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < side:
        raise ValueError(
            f"images: expected (batch, {channels}, height, width) with sides of {side} or more, got {shape}"
        )


def make_patch_embed(
    variant: PatchEmbed, channels: int, hidden: int, patch_size: int
) -> nn.Sequential:
    """The layers from an image to the first map.

    Args:
        variant: which.
        channels: of the image.
        hidden: width of the first stage.
        patch_size: pixels a side of a token; PatchEmbed.V2 is for 4.
    """
    if variant is PatchEmbed.V1:
        return nn.Sequential(
            nn.Conv2d(channels, hidden, patch_size, stride=patch_size),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(hidden),
        )
    return nn.Sequential(
        nn.Conv2d(channels, hidden // 2, 3, stride=2, padding=1),
        Permute(0, 2, 3, 1),
        nn.LayerNorm(hidden // 2),
        Permute(0, 3, 1, 2),
        nn.GELU(),
        nn.Conv2d(hidden // 2, hidden, 3, stride=2, padding=1),
        Permute(0, 2, 3, 1),
        nn.LayerNorm(hidden),
    )


def make_downsample(variant: Downsample, hidden: int, out: int) -> nn.Module:
    """The layer between two stages.

    Args:
        variant: which.
        hidden: width before it.
        out: width after it.
    """
    if variant is Downsample.V1:
        return PatchMerging(hidden, out)
    width, padding = (2, 0) if variant is Downsample.V2 else (3, 1)
    return nn.Sequential(
        Permute(0, 3, 1, 2),
        nn.Conv2d(hidden, out, width, stride=2, padding=padding),
        Permute(0, 2, 3, 1),
        nn.LayerNorm(out),
    )


def make_stages(
    depths: Sequence[int],
    dims: Sequence[int],
    downsample: Downsample,
    make_block: Callable[[int], nn.Module],
) -> nn.ModuleList:
    """All stages of a model.

    Args:
        depths: blocks a stage.
        dims: hidden width of each stage.
        downsample: variant of the layers between them.
        make_block: from the hidden width to a new block.
    """
    between: list[nn.Module] = [
        make_downsample(downsample, hidden, out) for hidden, out in itertools.pairwise(dims)
    ]
    stages = nn.ModuleList()
    for depth, hidden, after in zip(depths, dims, [*between, nn.Identity()], strict=True):
        stages.append(Stage([make_block(hidden) for _ in range(depth)], after))
    return stages
