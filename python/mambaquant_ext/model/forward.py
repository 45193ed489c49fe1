"""The float forward pass of a block, in plain torch and any floating dtype.

It is the definition that transforms preserve, that calibration observes, and that the emulated mode rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mambaquant_ext.artifacts.layout import Merge, Skip
from mambaquant_ext.model.parts import (
    apply_norm,
    causal_conv,
    excited,
    image_conv,
    route_shares,
    selective_scan,
    upsample,
    variation_gate,
)
from mambaquant_ext.model.weights import (
    BranchWeights,
    MixerWeights,
)
from mambaquant_ext.ops import hadamard_matrix
from mambaquant_ext.routes import Grid, ScanRoute

# A tap sees, and may replace, the tensor at a named site of a block. c, b: index of a convolution, a branch.
#   in         (batch, seqlen, hidden)      normalised input of in_proj, rotated where the model rotates it
#   xs, z      (batch, seqlen, dim)         conv input; gate before SiLU
#   x.c        (batch, tokens, dim)         conv output after SiLU: input of x_proj, the scan and D
#   dt.b       (batch, tokens, dt_rank)     input of dt_proj
#   B.b, C.b   (batch, tokens, dstate)      C rotated where the model rotates it
#   h.b        (steps, batch, dim, dstate)  state as the read-out sees it, rotated where the model rotates it
#   out        (batch, seqlen, dim)         input of out_proj, rotated where the model rotates it
#   out.class  (batch, 1, dim)              the same of the class token, where that has a range of its own
Tap = Callable[[str, Tensor], Tensor]


def no_tap(_site: str, value: Tensor) -> Tensor:
    """The tap that does nothing.

    Args:
        value: (...), returned as it is.
    """
    return value


@dataclass(frozen=True, slots=True)
class MixerState:
    """What a block carries from one token to the next.

    Attributes:
        conv: (batch, width - 1, dim), the latest conv inputs, oldest first.
        ssm: (batch, dim, dstate), in the basis of the (possibly smoothed) model.
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True, slots=True)
class _Convolved:
    """What a convolution gives: (batch, tokens, dim) after SiLU, over a grid."""

    x: Tensor
    grid: Grid


class _Walk:
    """Brings tokens into the order of a route, and back."""

    def __init__(self, route: ScanRoute, grid: Grid) -> None:
        self.tokens = None if route.is_forward else route.walk(grid)

    def gather(self, x: Tensor) -> Tensor:
        """(batch, tokens, n), stored order to order of the walk."""
        return x if self.tokens is None else x[:, self.tokens]

    def scatter(self, y: Tensor) -> Tensor:
        """The inverse of gather."""
        return y if self.tokens is None else torch.empty_like(y).index_copy_(1, self.tokens, y)


def mixer_forward(
    weights: MixerWeights,
    hidden_states: Tensor,
    state: MixerState | None = None,
    tap: Tap = no_tap,
    mask: Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[Tensor, MixerState | None]:
    """One block without its skip: norm, mixer.

    Args:
        weights: of the block, in the dtype to compute in.
        hidden_states: (batch, seqlen, hidden), the residual stream.
        state: from earlier tokens, or None. Only for blocks that are sequential.
        tap: sees, and may replace, the tensors named above.
        mask: (batch, seqlen), bool, False at padding tokens, which then leave every other token alone.
        grid: sizes of the axes whose row-major order the tokens have; (seqlen,) by default.

    Returns:
        out: (batch, seqlen, hidden).
        state: after the last token, of a sequential block; otherwise None.

    Raises:
        ValueError: a state for a block that is not sequential, a grid of another number of tokens, or fewer tokens
            than the class token's place needs.
    """
    seqlen = hidden_states.shape[1]
    grid = (seqlen,) if grid is None else grid
    if math.prod(grid) != seqlen:
        raise ValueError(f"expected a grid of {seqlen} tokens, got {grid}")
    if weights.class_token is not None and weights.class_token >= seqlen:
        raise ValueError(f"expected a class token at {weights.class_token}, got {seqlen} tokens")
    if state is not None and not weights.is_sequential:
        raise ValueError("expected no state for a block that walks several routes, got one")
    keep = None if mask is None else mask[..., None]
    normed = hidden_states if weights.norm is None else apply_norm(weights.norm, hidden_states)
    if weights.has_in_rotation:
        normed = normed @ hadamard_matrix(weights.hidden, normed.dtype)
    normed = tap("in", normed)
    xs = tap("xs", F.linear(normed, weights.in_x, weights.in_x_bias))
    gate = None
    if weights.in_z is not None:
        z = tap("z", F.linear(normed, weights.in_z, weights.in_z_bias))
        gate = z * torch.sigmoid(weights.gate_scale * z)
    if keep is not None:
        xs = xs * keep
    scanner = _Scanner(weights, xs, grid, state, tap, keep)
    v = _merged(scanner, gate)
    if weights.has_out_rotation:
        v = v @ hadamard_matrix(weights.dim, v.dtype)
    out = F.linear(_tap_out(weights, v, tap), weights.out, weights.out_bias)
    return out, scanner.final


def block_forward(
    weights: MixerWeights,
    hidden_states: Tensor,
    state: MixerState | None = None,
    tap: Tap = no_tap,
    mask: Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[Tensor, MixerState | None]:
    """mixer_forward and the block's skip.

    Args:
        weights: of the block.
        hidden_states: (batch, seqlen, hidden).
        state: as mixer_forward.
        tap: as mixer_forward.
        mask: as mixer_forward.
        grid: as mixer_forward.

    Returns:
        As mixer_forward, the skip added to out.
    """
    out, state = mixer_forward(weights, hidden_states, state, tap, mask, grid)
    if weights.skip is Skip.RESIDUAL:
        out = out + hidden_states
    if weights.skip is Skip.NORMALISED:
        assert weights.norm is not None
        out = out + apply_skip(weights, apply_norm(weights.norm, hidden_states))
    return out, state


def apply_skip(weights: MixerWeights, normed: Tensor) -> Tensor:
    """What a NORMALISED skip adds.

    Args:
        weights: with skip_weight and skip_bias.
        normed: (batch, seqlen, hidden), output of the norm.
    """
    assert weights.skip_weight is not None and weights.skip_bias is not None
    if weights.skip_weight.dim() == 2:
        return normed @ weights.skip_weight + weights.skip_bias
    return normed * weights.skip_weight + weights.skip_bias


class _Scanner:
    """Convolves and scans along the routes of one block, one call of it."""

    def __init__(
        self,
        weights: MixerWeights,
        xs: Tensor,
        grid: Grid,
        state: MixerState | None,
        tap: Tap,
        keep: Tensor | None,
    ) -> None:
        self.weights, self.xs, self.grid = weights, xs, grid
        self.state, self.tap, self.keep = state, tap, keep
        self.conv_state: Tensor | None = None
        self.ssm_state: Tensor | None = None
        self._shared: dict[int, _Convolved] = {}

    @property
    def final(self) -> MixerState | None:
        """The state after the last token, of a sequential block."""
        if not self.weights.is_sequential:
            return None
        assert self.conv_state is not None and self.ssm_state is not None
        return MixerState(self.conv_state, self.ssm_state)

    def scan(self, route: ScanRoute) -> tuple[Tensor, Grid]:
        """(batch, tokens, channels of the branch), and the grid of these tokens."""
        branch = self.weights.branches[route.branch]
        convolved = self._convolve(branch, route)
        walk = _Walk(route, convolved.grid)
        x = convolved.x[..., branch.channels]
        B, C, delta = self._parameters(x, branch, route.branch)
        initial = None if self.state is None else self.state.ssm
        y, self.ssm_state = selective_scan(
            walk.gather(x),
            walk.gather(delta),
            branch.A,
            walk.gather(B),
            walk.gather(C),
            branch.D,
            self.ssm_state if route.continues else initial,
            rotates_state=self.weights.has_state_rotation,
            see_state=lambda h: self.tap(f"h.{route.branch}", h),
        )
        return walk.scatter(y), convolved.grid

    def _parameters(
        self, x: Tensor, branch: BranchWeights, index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dt = self.tap(f"dt.{index}", F.linear(x, branch.x_dt, branch.x_dt_bias))
        B = self.tap(f"B.{index}", F.linear(x, branch.x_B))
        C = self.tap(f"C.{index}", F.linear(x, branch.x_C))
        return B, C, F.softplus(F.linear(dt, branch.dt, branch.dt_bias))

    def _convolve(self, branch: BranchWeights, route: ScanRoute) -> _Convolved:
        if branch.conv is None:
            return _Convolved(self.xs, self.grid)
        conv = self.weights.convs[branch.conv]
        if conv.is_causal and conv.along_route:
            walk = _Walk(route, self.grid)
            initial = None if self.state is None else self.state.conv
            y, self.conv_state = causal_conv(walk.gather(self.xs), conv.weight, conv.bias, initial)
            return self._activated(walk.scatter(y), self.grid, branch.conv)
        if branch.conv not in self._shared:
            if conv.is_causal:
                y, grid = causal_conv(self.xs, conv.weight, conv.bias, None)[0], self.grid
            else:
                y, grid = image_conv(self.xs, conv, self.grid)
            self._shared[branch.conv] = self._activated(y, grid, branch.conv)
        return self._shared[branch.conv]

    def _activated(self, y: Tensor, grid: Grid, index: int) -> _Convolved:
        x = self.tap(f"x.{index}", F.silu(y))
        return _Convolved(x if self.keep is None else x * self.keep, grid)


def _merged(scanner: _Scanner, gate: Tensor | None) -> Tensor:
    """(batch, seqlen, dim): the routes' results as one, normalised and gated."""
    weights = scanner.weights
    parts: dict[int, list[tuple[Tensor, Grid]]] = {}  # by first channel
    for route in weights.routes:
        first = weights.branches[route.branch].first_channel
        parts.setdefault(first, []).append(scanner.scan(route))
    heads = [_merged_head(scanner, parts[first], gate) for first in sorted(parts)]
    y = torch.cat(heads, -1) if len(heads) > 1 else heads[0]
    if weights.out_norm is not None and weights.merge is not Merge.NORMED_SUM:
        y = apply_norm(weights.out_norm, y)
    if weights.squeeze is not None and weights.excite is not None:
        y = excited(y, weights.squeeze, weights.excite)
    return y if gate is None or weights.merge is Merge.GATED else y * gate


def _merged_head(
    scanner: _Scanner, results: list[tuple[Tensor, Grid]], gate: Tensor | None
) -> Tensor:
    """The results of the routes over the same channels as one."""
    weights = scanner.weights
    if weights.merge is Merge.NORMED_SUM:
        assert weights.out_norm is not None
        results = [(apply_norm(weights.out_norm, y), grid) for y, grid in results]
    ys = torch.stack([upsample(y, grid, scanner.grid) for y, grid in results])
    if weights.merge is Merge.VARIATION:
        return ys.sum(0) * variation_gate(ys, weights.merge_threshold)
    if weights.merge is Merge.GATED:
        assert weights.merge_gate is not None
        vs = ys if gate is None else ys * gate
        return (vs * route_shares(vs, weights.merge_gate)).sum(0)
    return ys[0] if len(ys) == 1 else ys.sum(0)


def _tap_out(weights: MixerWeights, v: Tensor, tap: Tap) -> Tensor:
    """The tap at out_proj's input, the class token by itself where it has a range of its own."""
    at = weights.class_token
    if at is None:
        return tap("out", v)
    others = tap("out", torch.cat([v[:, :at], v[:, at + 1 :]], 1))
    return torch.cat([others[:, :at], tap("out.class", v[:, at : at + 1]), others[:, at:]], 1)
