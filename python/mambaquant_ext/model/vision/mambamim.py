"""MambaMIM's bottleneck: voxels as tokens with fixed positions, through residual blocks of a mixer and an MLP.

Source: Tang et al., MambaMIM (arXiv 2408.08070); parameter names of FengheTan9/MambaMIM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mambaquant_ext.model.vision.feedforward import Mlp
from mambaquant_ext.model.vision.mamba_mixer import MambaMixer

TEMPERATURE = 10000.0
# Parameters of the second direction, which checkpoints hold and this model's type of mixer ("v1") never reads.
_UNUSED = ("A_b_log", "D_b", "conv1d_b.", "x_proj_b.", "dt_proj_b.")


def sincos_positions(sizes: Sequence[int], hidden: int) -> Tensor:
    """Fixed embeddings of the places of a 3-D grid: for each axis sines, then cosines, of falling frequencies.

    Args:
        sizes: three sides.
        hidden: a multiple of 6.

    Returns:
        (1, tokens, hidden), tokens row-major.
    """
    count = hidden // 6
    frequencies = TEMPERATURE ** (-torch.arange(count, dtype=torch.get_default_dtype()) / count)
    places = torch.meshgrid([torch.arange(side) for side in sizes], indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in places]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)[None]


class MambaMlpBlock(nn.Module):
    """x + mamba(norm1(x)), then x + mlp(norm2(x)).

    Attributes:
        norm1, norm2: LayerNorm of hidden.
        mamba: the mixer.
        mlp: of twice the width.
    """

    def __init__(self, hidden: int, dstate: int, conv_width: int, expand: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.mamba = MambaMixer(hidden, dstate, conv_width, expand)
        self.mlp = Mlp(hidden, 2 * hidden)
        self.norm2 = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: (batch, seqlen, hidden).
        """
        x = x + self.mamba(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class MambaBottleneck(nn.Module):
    """Positions and blocks over the voxels of a map.

    Attributes:
        pos_embed: (1, voxels, hidden), not trained.
        blocks: list of them.
    """

    def __init__(
        self,
        hidden: int,
        sizes: Sequence[int],
        depth: int,
        dstate: int,
        conv_width: int,
        expand: int,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_positions(sizes, hidden), requires_grad=False)
        self.blocks = nn.ModuleList(
            MambaMlpBlock(hidden, dstate, conv_width, expand) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The map after the blocks.

        Args:
            x: (batch, hidden, depth, height, width).

        Returns:
            The same shape.
        """
        tokens = x.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.transpose(1, 2).reshape(x.shape)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's parameters without those that its mixers never read.

    Args:
        state: the checkpoint's parameters by name.
    """
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.rpartition("mamba.")[2].startswith(_UNUSED)
    }
