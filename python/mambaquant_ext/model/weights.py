"""Weights of a Mamba block, whatever family it is of, with the hooks that the transforms need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mambaquant_ext.artifacts.layout import Merge, NormKind, Skip, takes_single_tokens
from mambaquant_ext.routes import FORWARD, ScanRoute


@dataclass(frozen=True, slots=True, kw_only=True)
class NormWeights:
    """A norm over the last dimension.

    Attributes:
        kind: RMS or LAYER.
        weight: (n,), gamma.
        bias: (n,), beta; zeros for a norm without one.
        eps: added to the mean square or the variance.
    """

    kind: NormKind
    weight: Tensor
    bias: Tensor
    eps: float

    def replace(self, **changes: object) -> NormWeights:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def is_folded(self) -> bool:
        """Whether weight and bias have been moved into the linear behind."""
        return bool((self.weight == 1).all()) and not bool(self.bias.any())


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvWeights:
    """A depthwise convolution before SiLU: causal along the tokens, or two-dimensional over an image.

    Attributes:
        weight: (dim, width), oldest input first; or (dim, kernel_height, kernel_width), zero padded by half a kernel.
        bias: (dim,).
        stride: of both axes, 1 for a causal one. The routes behind it walk the smaller grid.
        along_route: a causal convolution walks each route that uses it; otherwise it walks tokens as stored, once
            for all routes.
    """

    weight: Tensor
    bias: Tensor
    stride: int = 1
    along_route: bool = True

    @property
    def is_causal(self) -> bool:
        """One-dimensional rather than two-dimensional."""
        return self.weight.dim() == 2

    def replace(self, **changes: object) -> ConvWeights:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchWeights:
    """A selective state space: what makes dt, B and C of x, and scans.

    Attributes:
        x_dt: (dt_rank, dim), rows of x_proj that make dt.
        x_dt_bias: (dt_rank,), zero unless dt is centred.
        x_B: (dstate, dim).
        x_C: (dstate, dim).
        dt: (dim, dt_rank).
        dt_bias: (dim,).
        A: (dim, dstate), -exp(A_log).
        D: (dim,).
        conv: index of the convolution that makes x, or None where x is in_proj's output itself.
        first_channel: of the channels of x that it scans, A.shape[0] of them.
    """

    x_dt: Tensor
    x_dt_bias: Tensor
    x_B: Tensor
    x_C: Tensor
    dt: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    conv: int | None = 0
    first_channel: int = 0

    @property
    def dim(self) -> int:
        """Channels."""
        return self.A.shape[0]

    @property
    def dstate(self) -> int:
        """States per channel."""
        return self.A.shape[1]

    @property
    def dt_rank(self) -> int:
        """Width between x_proj and dt_proj."""
        return self.dt.shape[1]

    @property
    def channels(self) -> slice:
        """Of x."""
        return slice(self.first_channel, self.first_channel + self.dim)

    def replace(self, **changes: object) -> BranchWeights:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerWeights:
    """A Mamba block: norm, in_proj, convolutions, scans along routes, their merge, gate, out_proj, skip.

    A language model's block has one convolution, one branch and one route. in_proj and x_proj are kept in their
    parts, because transforms and scales treat the parts differently (algorithm section 1.1). A row is one output
    channel everywhere.

    Attributes:
        norm: before in_proj, or None where the block gets its input normalised.
        in_x: (dim, hidden), rows of in_proj that make the conv input.
        in_x_bias: (dim,).
        in_z: (dim, hidden), rows of in_proj that make the gate, or None for a block without one.
        in_z_bias: (dim,), or None.
        convs: used by the branches.
        branches: used by the routes.
        routes: walks over the tokens. Routes whose branches scan the same channels are merged.
        merge: of their results.
        merge_gate: (routes, routes, dim), for Merge.GATED: the logit of the first index from the token mean of the
            gated result of the second.
        merge_threshold: for Merge.VARIATION.
        out_norm: between merge and gate, or inside Merge.NORMED_SUM, or None.
        squeeze: (excite_dim, dim), or None: y * sigmoid(excite relu(squeeze mean y)) between merge and gate, the mean
            over tokens.
        excite: (dim, excite_dim), or None.
        gate_scale: (dim,), s of S-SiLU: the gate is z * sigmoid(s * z).
        out: (hidden_out, dim).
        out_bias: (hidden_out,).
        skip: what is added to the output.
        skip_weight: (hidden,) or (hidden, hidden) with row-vector convention, of a NORMALISED skip.
        skip_bias: (hidden,), of a NORMALISED skip.
        class_token: position of a token whose out_proj input has a range of its own, or None.
        has_in_rotation: the input of in_proj goes through the Hadamard transform first (R1 inside the block).
        has_out_rotation: the input of `out` goes through the Hadamard transform first (R2).
        has_state_rotation: h goes through the Hadamard transform on the state axis before C (R4).
    """

    norm: NormWeights | None
    in_x: Tensor
    in_x_bias: Tensor
    in_z: Tensor | None
    in_z_bias: Tensor | None
    convs: tuple[ConvWeights, ...]
    branches: tuple[BranchWeights, ...]
    routes: tuple[ScanRoute, ...] = (FORWARD,)
    merge: Merge = Merge.SUM
    merge_gate: Tensor | None = None
    merge_threshold: float = 0.0
    out_norm: NormWeights | None = None
    squeeze: Tensor | None = None
    excite: Tensor | None = None
    gate_scale: Tensor
    out: Tensor
    out_bias: Tensor
    skip: Skip = Skip.RESIDUAL
    skip_weight: Tensor | None = None
    skip_bias: Tensor | None = None
    class_token: int | None = None
    has_in_rotation: bool = False
    has_out_rotation: bool = False
    has_state_rotation: bool = False

    @property
    def hidden(self) -> int:
        """Width of the block's input (d_model)."""
        return self.in_x.shape[1]

    @property
    def dim(self) -> int:
        """Inner width (d_inner)."""
        return self.out.shape[1]

    @property
    def is_sequential(self) -> bool:
        """Whether tokens can come one at a time: one route, as stored, first to last."""
        return takes_single_tokens(self)

    @property
    def excite_dim(self) -> int | None:
        """Inner width of the squeeze-and-excitation, or None."""
        return None if self.squeeze is None else self.squeeze.shape[0]

    def replace(self, **changes: object) -> MixerWeights:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map_branches(self, function: Callable[[BranchWeights], BranchWeights]) -> MixerWeights:
        """A copy with `function` applied to every branch."""
        return self.replace(branches=tuple(function(branch) for branch in self.branches))

    def map(self, function: Callable[[Tensor], Tensor]) -> MixerWeights:
        """A copy with `function` applied to every tensor."""
        return map_tensors(self, function)

    def to(self, dtype: torch.dtype) -> MixerWeights:
        """A copy in another floating dtype."""
        return self.map(lambda tensor: tensor.to(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelWeights:
    """A stack of blocks between an embedding table and a head.

    Attributes:
        embedding: (vocab, hidden).
        layers: the blocks, first to last.
        norm_f: (hidden,), gamma of the final norm.
        norm_eps: of the final norm.
        lm_head: (vocab, hidden).
    """

    embedding: Tensor
    layers: tuple[MixerWeights, ...]
    norm_f: Tensor
    norm_eps: float
    lm_head: Tensor

    def replace(self, **changes: object) -> LanguageModelWeights:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> LanguageModelWeights:
        """A copy in another floating dtype."""
        return map_tensors(self, lambda tensor: tensor.to(dtype))


_Weights = TypeVar("_Weights")


def map_tensors(weights: _Weights, function: Callable[[Tensor], Tensor]) -> _Weights:
    """A copy of a dataclass with `function` applied to every tensor in it, at any depth.

    Args:
        weights: a dataclass whose fields hold tensors, dataclasses, tuples of them, or plain values.
        function: of a tensor.
    """

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, tuple):
            return tuple(mapped(item) for item in value)
        # A route has no tensors, and stays the object that it is.
        if dataclasses.is_dataclass(value) and not isinstance(value, (type, ScanRoute)):
            return map_tensors(value, function)
        return value

    changes = {f.name: mapped(getattr(weights, f.name)) for f in dataclasses.fields(weights)}  # type: ignore[arg-type]
    return dataclasses.replace(weights, **changes)  # type: ignore[type-var]
