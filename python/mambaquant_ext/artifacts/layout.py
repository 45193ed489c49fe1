"""The structure of a Mamba block: sizes, routes and switches, without any values."""

from __future__ import annotations

import enum
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from mambaquant_ext.routes import FORWARD, ScanRoute

# Name to shape and dtype of tensors.
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


class NormKind(str, enum.Enum):
    """RMS divides by the root mean square; LAYER subtracts the mean first."""

    RMS = "rms"
    LAYER = "layer"


class Skip(str, enum.Enum):
    """What a block adds to its mixer's output.

    RESIDUAL adds its input. NORMALISED adds the normalised input (Mamba-ND, algorithm section 1.4). NONE adds
    nothing: whoever calls the block does.
    """

    RESIDUAL = "residual"
    NORMALISED = "normalised"
    NONE = "none"


class Merge(str, enum.Enum):
    """How the results of several routes become one.

    SUM adds them; a mean is a sum whose factor stands in out_proj. NORMED_SUM applies the block's out_norm to each
    before it adds them, those of a coarser map upsampled (MSVMamba). GATED weighs each route by a softmax over routes
    of a linear function of the routes' token means (RSMamba). VARIATION multiplies the sum by how much the routes
    differ: relu(standard deviation over mean, both over routes, minus a threshold) (MHS-VM's gated fusion unit).
    """

    SUM = "sum"
    NORMED_SUM = "normed_sum"
    GATED = "gated"
    VARIATION = "variation"


class StreamWrite(str, enum.Enum):
    """What a block with a rotated input leaves behind.

    CENTERED: x P R where the norms are LayerNorms, x R where they are RMSNorms. ROTATED: x R, with its mean, for a
    reader that is no norm. PLAIN: x, for a reader that cannot be rotated; only a normalised skip, which is a matrix
    anyway, can leave the basis.
    """

    CENTERED = "centered"
    ROTATED = "rotated"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvLayout:
    """A depthwise convolution.

    Attributes:
        kernel: (width,) of a causal one, (height, width) of one over an image.
        stride: of both axes, 1 for a causal one.
        along_route: a causal one walks each route that uses it; otherwise tokens as stored, once for all routes.
    """

    kernel: tuple[int, ...]
    stride: int = 1
    along_route: bool = True

    @property
    def is_causal(self) -> bool:
        """One-dimensional rather than two-dimensional."""
        return len(self.kernel) == 1

    def expected(self, dim: int) -> Expected:
        """Tensors of a PackedConv."""
        f32 = torch.float32
        return {
            "weight": ((*self.kernel, dim), torch.int8),
            "weight_scale": ((dim,), f32),
            "bias": ((dim,), f32),
            "x_scale": ((dim,), f32),
            "x_zero_point": ((dim,), torch.int32),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchLayout:
    """A selective state space.

    Attributes:
        dim: channels.
        dstate: states per channel.
        dt_rank: width between x_proj and dt_proj.
        conv: index of the convolution that makes x, or None where x is in_proj's output itself.
        first_channel: of the channels of x that it scans.
    """

    dim: int
    dstate: int
    dt_rank: int
    conv: int | None = 0
    first_channel: int = 0

    def expected(self) -> Expected:
        """Tensors of a PackedBranch."""
        rows, dim, f32 = self.dt_rank + 2 * self.dstate, self.dim, torch.float32
        return {
            "x_proj": ((rows, dim), torch.int8),
            "x_proj_scale": ((rows,), f32),
            "x_proj_bias": ((rows,), f32),
            "dtBC_scale": ((rows,), f32),
            "dt_proj": ((dim, self.dt_rank), torch.int8),
            "dt_proj_scale": ((dim,), f32),
            "dt_bias": ((dim,), f32),
            "A": ((self.dstate, dim), f32),
            "D": ((dim,), f32),
            "readout_scale": ((dim,), f32),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """What a block's tensors do not tell: sizes, structure, and how they are used.

    Attributes:
        hidden: width of the block's input.
        dim: inner width.
        norm: before in_proj, or None.
        norm_eps: of that norm.
        has_gate: in_proj has rows for z.
        convs: used by the branches.
        branches: used by the routes.
        routes: walks over the tokens.
        merge: of the routes' results.
        merge_threshold: for Merge.VARIATION.
        out_norm: between merge and gate, or None.
        out_norm_eps: of that norm.
        excite_dim: inner width of a squeeze-and-excitation between merge and gate, or None.
        skip: what is added to the output.
        has_skip_matrix: a NORMALISED skip is a matrix rather than a factor a channel.
        class_token: position of a token whose out_proj input has a scale of its own, or None.
        has_in_rotation: an online Hadamard transform before in_proj (R1 inside the block).
        has_out_rotation: R2 is in out_proj.
        has_state_rotation: R4 is in x_proj's C rows.
        quantize_readout: level L2 rather than L1.
        weight_bits: of every weight matrix.
        activation_bits: of every activation but the gate.
        gate_bits: of the gate.
    """

    hidden: int
    dim: int
    norm: NormKind | None = NormKind.RMS
    norm_eps: float = 1e-5
    has_gate: bool = True
    convs: tuple[ConvLayout, ...] = ()
    branches: tuple[BranchLayout, ...] = ()
    routes: tuple[ScanRoute, ...] = (FORWARD,)
    merge: Merge = Merge.SUM
    merge_threshold: float = 0.0
    out_norm: NormKind | None = None
    out_norm_eps: float = 1e-5
    excite_dim: int | None = None
    skip: Skip = Skip.RESIDUAL
    has_skip_matrix: bool = False
    class_token: int | None = None
    has_in_rotation: bool = False
    has_out_rotation: bool = False
    has_state_rotation: bool = False
    quantize_readout: bool = True
    weight_bits: int = 8
    activation_bits: int = 8
    gate_bits: int = 8

    def __post_init__(self) -> None:
        """Checks that the parts fit together.

        Raises:
            ValueError: a number outside its range, an index of a part that is not there, a branch without a
                route, branches that do not make up x, or routes that cannot be merged or continued.
        """
        for name, size in (("hidden", self.hidden), ("dim", self.dim)):
            _check(size >= 1, name, "at least 1", size)
        for name, eps in (("norm_eps", self.norm_eps), ("out_norm_eps", self.out_norm_eps)):
            _check(0 <= eps < float("inf"), name, "a number of at least 0", eps)
        for conv in self.convs:
            fits = len(conv.kernel) in (1, 2) and min(conv.kernel, default=0) >= 1
            _check(fits, "convs.kernel", "one or two sizes of at least 1", conv.kernel)
            fits = conv.stride >= 1 and (conv.stride == 1 or not conv.is_causal)
            _check(fits, "convs.stride", "1, or more over an image", conv.stride)
        _check(bool(self.branches), "branches", "at least one", self.branches)
        for branch in self.branches:
            self._check_branch(branch)
        _check(bool(self.routes), "routes", "at least one", self.routes)
        _check(not self.routes[0].continues, "routes[0].continues", "False", True)
        for route in self.routes:
            inside = 0 <= route.branch < len(self.branches)
            _check(inside, "routes.branch", f"below {len(self.branches)}", route.branch)
        for before, route in itertools.pairwise(self.routes):
            # Only there is the state in the same basis: each branch has scales of its own.
            fits = not route.continues or route.branch == before.branch
            _check(fits, "routes.continues", f"branch {before.branch} again", route.branch)
        unused = set(range(len(self.branches))) - {route.branch for route in self.routes}
        _check(not unused, "routes", f"one for each of {len(self.branches)} branches", self.routes)
        self._check_heads()
        self._check_merge()
        has_normed = self.norm is not None or self.skip is not Skip.NORMALISED
        _check(has_normed, "skip", "another than normalised without a norm", self.skip.value)
        _check((self.class_token or 0) >= 0, "class_token", "at least 0", self.class_token)
        for name in ("weight_bits", "activation_bits", "gate_bits"):
            _check(2 <= getattr(self, name) <= 8, name, "2 to 8", getattr(self, name))

    def _check_merge(self) -> None:
        threshold, width = self.merge_threshold, self.excite_dim
        has_norm = self.out_norm is not None
        is_coarse = any(conv.stride > 1 for conv in self.convs)
        _check(
            not is_coarse or self.merge is Merge.NORMED_SUM,
            "merge",
            "normed_sum with a stride",
            self.merge.value,
        )
        _check(
            has_norm or self.merge is not Merge.NORMED_SUM, "out_norm", "a norm to merge with", None
        )
        heads = Counter(self.branches[route.branch].first_channel for route in self.routes)
        gated, varied = self.merge is Merge.GATED, self.merge is Merge.VARIATION
        # A gated merge takes results behind their gates: nothing can come between.
        is_last = not has_norm and width is None and len(heads) == 1
        normed = self.merge is Merge.NORMED_SUM
        _check(
            len(heads) == 1 or not normed,
            "merge",
            "another than normed_sum with heads",
            "normed_sum",
        )
        _check(is_last or not gated, "merge", "another than gated with norms or heads", "gated")
        several = min(heads.values()) > 1
        _check(
            several or not varied, "routes", "several over each channel to tell apart", self.routes
        )
        _check(math.isfinite(threshold), "merge_threshold", "a finite number", threshold)
        _check(width is None or width >= 1, "excite_dim", "at least 1", width)

    def _check_heads(self) -> None:
        """Branches of the same first channel are merged: equally wide, and side by side they make up x."""
        heads = sorted({(branch.first_channel, branch.dim) for branch in self.branches})
        ends = [0, *(first + dim for first, dim in heads)]
        fits = [first for first, _ in heads] == ends[:-1] and ends[-1] == self.dim
        _check(fits, "branches", f"channels that make up 0 to {self.dim}", heads)

    def _check_branch(self, branch: BranchLayout) -> None:
        for name in ("dim", "dstate", "dt_rank"):
            _check(
                getattr(branch, name) >= 1, f"branches.{name}", "at least 1", getattr(branch, name)
            )
        inside = branch.conv is None or 0 <= branch.conv < len(self.convs)
        _check(inside, "branches.conv", f"below {len(self.convs)}", branch.conv)
        inside = 0 <= branch.first_channel <= self.dim - branch.dim
        _check(
            inside, "branches.first_channel", f"0 to {self.dim - branch.dim}", branch.first_channel
        )

    @property
    def is_sequential(self) -> bool:
        """Whether tokens can come one at a time: one route, as stored, first to last."""
        return takes_single_tokens(self)

    def expected(self) -> Expected:
        """Shape and dtype of every tensor of a PackedBlock of this layout, by flat name."""
        hidden, dim, routes, f32 = self.hidden, self.dim, len(self.routes), torch.float32
        rows = 2 * dim if self.has_gate else dim
        found: Expected = {}
        if self.norm is not None:
            found |= {"norm_weight": ((hidden,), f32), "norm_bias": ((hidden,), f32)}
        found |= {
            "in_scale": ((1,), f32),
            "in_proj": ((rows, hidden), torch.int8),
            "in_proj_scale": ((rows,), f32),
            "in_proj_bias": ((rows,), f32),
            "xz_scale": ((rows,), f32),
            "gate_scale": ((dim,), f32),
        }
        for index, conv in enumerate(self.convs):
            found |= {f"convs.{index}.{name}": e for name, e in conv.expected(dim).items()}
        for index, branch in enumerate(self.branches):
            found |= {f"branches.{index}.{name}": e for name, e in branch.expected().items()}
        if self.merge is Merge.GATED:
            found |= {"merge_gate": ((routes, routes, dim), f32)}
        if self.out_norm is not None:
            found |= {"out_norm_weight": ((dim,), f32), "out_norm_bias": ((dim,), f32)}
        if self.excite_dim is not None:
            found |= {
                "squeeze": ((self.excite_dim, dim), f32),
                "excite": ((dim, self.excite_dim), f32),
            }
        if self.skip is Skip.NORMALISED:
            shape = (hidden, hidden) if self.has_skip_matrix else (hidden,)
            found |= {"skip_weight": (shape, f32), "skip_bias": ((hidden,), f32)}
        if self.class_token is not None:
            found |= {"class_out_scale": ((1,), f32)}
        return found | {
            "out_proj": ((hidden, dim), torch.int8),
            "out_proj_scale": ((hidden,), f32),
            "out_proj_bias": ((hidden,), f32),
            "out_scale": ((1,), f32),
        }


def takes_single_tokens(block: Any) -> bool:
    """Whether a block can take its tokens one at a time: one route, as stored, first to last.

    Args:
        block: a BlockLayout, or float weights, which have the same parts.
    """
    return (
        block.routes == (FORWARD,)
        and block.excite_dim is None
        and len(block.convs) == 1
        and block.convs[0].is_causal
        and block.convs[0].along_route
        and block.branches[0].conv == 0
        and block.merge is Merge.SUM
        and block.class_token is None
    )


def _check(is_right: bool, name: str, expected: str, got: object) -> None:
    if not is_right:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
