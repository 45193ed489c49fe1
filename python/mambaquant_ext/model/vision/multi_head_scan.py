"""The multi-head scan: heads on parts of the channels, each along four routes of a pattern of its own.

Source: Ji, MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba (arXiv 2406.05992); parameter names of
PixDeep/MHS-VM.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext import orders
from mambaquant_ext.model.vision.branches import SelectiveBranches
from mambaquant_ext.model.vision.feedforward import conv_channels_last, depthwise_conv

# Added to the mean that the coefficient of variation divides by.
CV_EPS = 1e-5


class Pattern(str, enum.Enum):
    """The two walks of a head: C snakes, X diagonals, S spirals, Z rows and columns."""

    C = "C"
    X = "X"
    S = "S"
    Z = "Z"


# Of a module with so many heads, in the order of their channels.
HEAD_PATTERNS: dict[int, tuple[Pattern, ...]] = {
    3: (Pattern.C, Pattern.X, Pattern.S),
    4: (Pattern.C, Pattern.X, Pattern.S, Pattern.Z),
}


def pattern_orders(pattern: Pattern, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The two walks of a pattern over a map; its four routes are each of them and its reverse.

    Args:
        pattern: of the head.
        height: of the map.
        width: of the map.

    Returns:
        Two orders, (height * width,), int32.
    """
    if pattern is Pattern.C:
        return orders.snake_rows(height, width), orders.snake_columns(height, width)
    if pattern is Pattern.X:
        walk = orders.diagonal(height, width)
        return walk, orders.mirror_columns(walk, width)
    if pattern is Pattern.S:
        walk = orders.spiral(height, width)
        return walk, orders.mirror_rows(walk, width)
    return orders.row_major(height, width), orders.column_major(height, width)


class GatedFusion(nn.Module):
    """The sum over the routes, gated by how much they differ.

    y = sum * relu(cv - threshold), cv = std / (mean(y - min) + CV_EPS), all over the routes; std with routes - 1.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, y: Tensor) -> Tensor:
        """The fused map.

        Args:
            y: (routes, batch, height * width, dim), tokens in storage order.

        Returns:
            (batch, height * width, dim).
        """
        above_least = y - y.min(0).values
        variation = y.std(0) / (above_least.mean(0) + CV_EPS)
        return y.sum(0) * F.relu(variation - self.threshold)


class RouteScan(nn.Module):
    """A head's scans: from a map to the results of its four routes.

    Branch k of the engine scans route k: the first walk, its reverse, the second walk, its reverse.

    Attributes:
        seq2seq_engine: the head's weights; checkpoints hold them under this name, too.
    """

    def __init__(self, pattern: Pattern, engine: SelectiveBranches) -> None:
        super().__init__()
        self.pattern = pattern
        self.seq2seq_engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """The results of all routes, every token in its place.

        Args:
            x: (batch, height, width, dim).

        Returns:
            (routes, batch, height * width, dim).
        """
        tokens = x.flatten(1, 2)
        walks = [
            order.to(x.device)
            for walk in pattern_orders(self.pattern, x.shape[1], x.shape[2])
            for order in (walk, walk.flip(0))
        ]
        scanned = [
            self.seq2seq_engine.scan_branch(branch, tokens[:, order])[:, orders.inverse(order)]
            for branch, order in enumerate(walks)
        ]
        return torch.stack(scanned)


class ScanHead(nn.Module):
    """One head: scans along its pattern's routes, fused.

    Attributes:
        mambaeng: the weights of its four branches.
        scanning: the scans.
        esfusion: the fusion.
    """

    def __init__(self, pattern: Pattern, dim: int, dstate: int, threshold: float) -> None:
        super().__init__()
        self.esfusion = GatedFusion(threshold)
        self.mambaeng = SelectiveBranches(
            branches=4, dim=dim, dt_rank=math.ceil(dim / 16), dstate=dstate
        )
        self.scanning = RouteScan(pattern, self.mambaeng)

    def forward(self, x: Tensor) -> Tensor:
        """The head's output.

        Args:
            x: (batch, height, width, dim).

        Returns:
            (batch, height * width, dim).
        """
        y: Tensor = self.esfusion(self.scanning(x))
        return y


class MultiHeadScan(nn.Module):
    """x_ssproj, heads on equal parts of its channels, their concatenation, then cat_norm and y_proj where asked for.

    Attributes:
        x_ssproj: hidden to heads * dim, dim = hidden // heads; no bias.
        x_ssproj_W: its weight; checkpoints hold it under this name, too.
        scanhead_C, scanhead_X, scanhead_S: heads, and scanhead_Z with four of them.
        cat_norm: LayerNorm of heads * dim, or absent.
        y_proj: heads * dim to hidden, no bias, or absent.
    """

    def __init__(
        self, *, hidden: int, heads: int, dstate: int, threshold: float, has_projection: bool
    ) -> None:
        super().__init__()
        self.patterns = HEAD_PATTERNS[heads]
        dim = hidden // heads
        self.x_ssproj = nn.Linear(hidden, heads * dim, bias=False)
        self.x_ssproj_W = self.x_ssproj.weight
        for pattern in self.patterns:
            head = ScanHead(pattern, dim, dstate, threshold)
            self.add_module(f"scanhead_{pattern.value}", head)
        self.has_projection = has_projection
        if has_projection:
            self.cat_norm = nn.LayerNorm(heads * dim)
            self.y_proj = nn.Linear(heads * dim, hidden, bias=False)

    @property
    def heads(self) -> list[ScanHead]:
        """The heads in the order of their channels."""
        heads = [self.get_submodule(f"scanhead_{pattern.value}") for pattern in self.patterns]
        return [head for head in heads if isinstance(head, ScanHead)]

    def forward(self, x: Tensor) -> Tensor:
        """The heads' outputs, joined.

        Args:
            x: (batch, height, width, hidden).

        Returns:
            (batch, height, width, hidden).
        """
        parts = self.x_ssproj(x).chunk(len(self.patterns), -1)
        y = torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], -1)
        if self.has_projection:
            y = self.y_proj(self.cat_norm(y))
        return y.view(x.shape)


class VSSUnGated(nn.Module):
    """out_norm(mhs(silu(conv2d(x)))).

    Attributes:
        conv2d: depthwise, 3x3, with bias.
        mhs: the multi-head scan.
        out_norm: LayerNorm of hidden.
    """

    def __init__(self, hidden: int, scan: MultiHeadScan) -> None:
        super().__init__()
        self.conv2d = depthwise_conv(hidden, 3, bias=True)
        self.mhs = scan
        self.out_norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The mixer's output, without norm and residual add.

        Args:
            x: (batch, height, width, hidden).
        """
        y: Tensor = self.out_norm(self.mhs(F.silu(conv_channels_last(self.conv2d, x))))
        return y


class VSSGate(VSSUnGated):
    """VSSUnGated of the first half of in_proj, times silu of the second; there is no projection after the gate.

    Attributes:
        in_proj: hidden to 2 hidden, x first, then z; no bias.
    """

    def __init__(self, hidden: int, scan: MultiHeadScan) -> None:
        super().__init__(hidden, scan)
        self.in_proj = nn.Linear(hidden, 2 * hidden, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The mixer's output, without norm and residual add.

        Args:
            hidden_states: (batch, height, width, hidden).
        """
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        return super().forward(x) * F.silu(z)
