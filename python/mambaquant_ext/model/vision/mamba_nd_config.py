"""The configuration of Mamba-ND (jacklishufan/Mamba-ND), the order of its layers, and the published sizes."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mambaquant_ext.model.vision.config import VisionConfig


class Factorization(str, enum.Enum):
    """What one walk of a volume covers.

    NONE: all tokens. HW_T: a frame in the first two of three orders, all tokens in the third. H_W_T: one line,
    along w, h and t in turn.
    """

    NONE = "none"
    HW_T = "hw_t"
    H_W_T = "h_w_t"


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """The walks of one layer over a grid of tokens that is stored row-major.

    Attributes:
        axes: the grid's axes, slowest first, as the walks see them.
        walked: how many of the last of them one walk covers; each index of the others has a walk of its own.
        reverse: every walk goes from its last token to its first.
    """

    axes: tuple[int, ...]
    walked: int
    reverse: bool

    def unravel(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Storage order to the order of the walks.

        Args:
            x: (batch, tokens, hidden), the grid row-major.
            grid: its shape.

        Returns:
            (batch * walks, steps, hidden).
        """
        x = x.unflatten(1, grid).permute(0, *(1 + axis for axis in self.axes), 1 + len(grid))
        steps = math.prod(grid[axis] for axis in self.axes[-self.walked :])
        x = x.reshape(-1, steps, x.shape[-1])
        return x.flip(1) if self.reverse else x

    def ravel(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The inverse of unravel.

        Args:
            x: (batch * walks, steps, hidden).
            grid: the shape of the grid.

        Returns:
            (batch, tokens, hidden).
        """
        x = x.flip(1) if self.reverse else x
        x = x.reshape(-1, *(grid[axis] for axis in self.axes), x.shape[-1])
        back = (1 + self.axes.index(axis) for axis in range(len(grid)))
        return x.permute(0, *back, 1 + len(grid)).flatten(1, len(grid))

    def tokens(self, grid: tuple[int, ...]) -> Tensor:
        """The token at each step of each walk.

        Args:
            grid: the shape of the grid.

        Returns:
            (walks, steps), int64, indices of tokens in storage order.
        """
        return self.unravel(torch.arange(math.prod(grid))[None, :, None], grid)[..., 0]


_ORDERS_2D = ((0, 1), (1, 0))
# Time, height, width: by frame and row, by frame and column, by column and row.
_ORDERS_3D = ((0, 1, 2), (0, 2, 1), (2, 1, 0))
_WALKED_3D = {
    Factorization.NONE: (3, 3, 3),
    Factorization.HW_T: (2, 2, 3),
    Factorization.H_W_T: (1, 1, 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaNDConfig(VisionConfig):
    """A Mamba-ND over images (two axes: height, width) or volumes (three: time, height, width).

    Attributes:
        input_size: of the input, one number an axis.
        patch_size: of a patch, also the stride.
        downsample: layers after which two by two tokens are merged into one; images only.
        factorization: what one walk of a volume covers.
        final_norm: LayerNorm ln1 after the last layer.
        pooled_norm: LayerNorm ln2 after the mean over the tokens.
        final_norm_epsilon: of ln1 and ln2.
        out_indices: layers whose output an encoder returns; such a model has no head and no final norms.
    """

    input_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    downsample: tuple[int, ...] = ()
    factorization: Factorization = Factorization.NONE
    final_norm: bool = False
    pooled_norm: bool = False
    final_norm_epsilon: float = 1e-6
    out_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or outside its range, or fields that do not go together.
        """
        VisionConfig.__post_init__(self)
        if len(self.input_size) not in {2, 3} or min(self.input_size) < 1:
            self._refuse("input_size", "two or three positive sizes", self.input_size)
        if len(self.patch_size) != len(self.input_size) or min(self.patch_size) < 1:
            self._refuse("patch_size", f"{len(self.input_size)} positive sizes", self.patch_size)
        if any(size % patch for size, patch in zip(self.input_size, self.patch_size, strict=True)):
            self._refuse("patch_size", f"divisors of {self.input_size}", self.patch_size)
        if not self.final_norm_epsilon > 0:
            self._refuse("final_norm_epsilon", "a positive number", self.final_norm_epsilon)
        for name in ("downsample", "out_indices"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers) & set(range(self.depth))):
                self._refuse(name, f"increasing layers below {self.depth}", layers)
        self._check_axes()
        self._check_outputs()

    def _check_axes(self) -> None:
        is_image = len(self.input_size) == 2
        if is_image and self.factorization is not Factorization.NONE:
            self._refuse("factorization", "'none' for images", self.factorization.value)
        if not is_image and self.downsample:
            self._refuse("downsample", "no layers for volumes", self.downsample)
        halved = 2 ** len(self.downsample)
        if any(size % halved for size in self.grid):
            self._refuse(
                "downsample", f"a grid that can be halved, from {self.grid}", self.downsample
            )

    def _check_outputs(self) -> None:
        if not self.out_indices:
            self._require_positive("num_classes")
            return
        if self.num_classes != 0:
            self._refuse("num_classes", "0 for an encoder", self.num_classes)
        for name in ("final_norm", "pooled_norm"):
            if getattr(self, name):
                self._refuse(name, "False for an encoder", getattr(self, name))

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis before the first layer."""
        sizes = zip(self.input_size, self.patch_size, strict=True)
        return tuple(size // patch for size, patch in sizes)

    def layer_grid(self, index: int) -> tuple[int, ...]:
        """Tokens along each axis that a layer walks over.

        Args:
            index: of the layer.
        """
        merges = sum(layer < index for layer in self.downsample)
        return tuple(size >> merges for size in self.grid)

    def layer_order(self, index: int) -> LayerOrder:
        """The walks of a layer (algorithm section 1.4).

        Args:
            index: of the layer. Two layers share an order of the axes, there and back.
        """
        orders = _ORDERS_2D if len(self.grid) == 2 else _ORDERS_3D
        turn = index // 2 % len(orders)
        walked = 2 if len(self.grid) == 2 else _WALKED_3D[self.factorization][turn]
        return LayerOrder(orders[turn], walked, reverse=index % 2 == 1)


MAMBA_2D_S = MambaNDConfig(
    embed_dim=384,
    depth=24,
    num_classes=1000,
    input_size=(224, 224),
    patch_size=(8, 8),
    downsample=(9,),
    final_norm=True,
    pooled_norm=True,
)
MAMBA_2D_B = MambaNDConfig(
    embed_dim=768,
    depth=24,
    num_classes=1000,
    input_size=(224, 224),
    patch_size=(8, 8),
    downsample=(9,),
    final_norm=True,
    pooled_norm=True,
)
# The head of the public UCF-101 configuration, which is as wide as that of Kinetics-400.
MAMBA_3D_S = MambaNDConfig(
    embed_dim=384,
    depth=36,
    num_classes=400,
    input_size=(32, 224, 224),
    patch_size=(2, 16, 16),
)
# Of UNETR on BTCV: its decoder reads maps 3, 6, 9 and the last; the last layer has no reader.
MAMBA_3D_S_ENCODER = MambaNDConfig(
    embed_dim=384,
    depth=24,
    num_classes=0,
    channels=1,
    input_size=(96, 96, 96),
    patch_size=(16, 16, 16),
    mean=(0.0,),
    std=(1.0,),
    out_indices=tuple(range(0, 24, 2)),
)
