"""The patch embedding of the OpenMMLab models: Mamba-ND and RSMamba."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def corner_padding(size: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> list[int]:
    """How many zeros each axis lacks at its end for ceil(size / stride) patches.

    Args:
        size: of the input, one number an axis.
        patch: of a patch.
        stride: from one patch to the next.
    """
    return [
        max((-(-length // step) - 1) * step + width - length, 0)
        for length, width, step in zip(size, patch, stride, strict=True)
    ]


class PatchEmbed(nn.Module):
    """Patches of an image or a volume to tokens, the last axis fastest.

    Zeros are added at the end of each axis until patches cover the input ("corner" padding), so that there are
    ceil(size / stride) patches along an axis.
    """

    def __init__(
        self, channels: int, embed_dim: int, patch: Sequence[int], stride: Sequence[int], bias: bool
    ) -> None:
        """Weights as at the start of training.

        Args:
            channels: of the input.
            embed_dim: width of a token.
            patch: size of a patch, two numbers for an image and three for a volume.
            stride: from one patch to the next, as many.
            bias: the projection has one.
        """
        super().__init__()
        conv: Any = nn.Conv2d if len(patch) == 2 else nn.Conv3d
        self.projection = conv(channels, embed_dim, tuple(patch), tuple(stride), bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """One token a patch.

        Args:
            images: (batch, channels, *size).

        Returns:
            (batch, patches, embed_dim).
        """
        projection = self.projection
        padding = corner_padding(images.shape[2:], projection.kernel_size, projection.stride)
        # F.pad names the last axis first, and the start of an axis before its end.
        images = F.pad(images, [count for pad in reversed(padding) for count in (0, pad)])
        tokens: Tensor = projection(images)
        return tokens.flatten(2).transpose(1, 2)
