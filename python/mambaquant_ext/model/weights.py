"""Weights of a Mamba-1 block and language model, with the hooks that the transforms need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerWeights:
    """One pre-norm block: RMSNorm, Mamba-1 mixer, residual add.

    in_proj and x_proj are kept in their parts, because transforms and scales treat the parts differently
    (algorithm section 1.1). A row is one output channel everywhere.

    Attributes:
        norm_weight: (hidden,), gamma.
        norm_eps: added to the mean square.
        in_x: (dim, hidden), rows of in_proj that make the conv input.
        in_z: (dim, hidden), rows of in_proj that make the gate.
        in_x_bias: (dim,).
        in_z_bias: (dim,).
        conv: (dim, width), depthwise taps, oldest input first.
        conv_bias: (dim,).
        x_dt: (dt_rank, dim), rows of x_proj that make dt.
        x_dt_bias: (dt_rank,), zero unless dt is centred.
        x_B: (dstate, dim).
        x_C: (dstate, dim).
        dt: (dim, dt_rank).
        dt_bias: (dim,).
        A: (dim, dstate), -exp(A_log).
        D: (dim,).
        out: (hidden, dim).
        out_bias: (hidden,).
        gate_scale: (dim,), s of S-SiLU: the gate is z * sigmoid(s * z).
        has_out_rotation: the input of `out` goes through the Hadamard transform first (R2).
        has_state_rotation: h goes through the Hadamard transform on the state axis before C (R4).
    """

    norm_weight: Tensor
    norm_eps: float
    in_x: Tensor
    in_z: Tensor
    in_x_bias: Tensor
    in_z_bias: Tensor
    conv: Tensor
    conv_bias: Tensor
    x_dt: Tensor
    x_dt_bias: Tensor
    x_B: Tensor
    x_C: Tensor
    dt: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out: Tensor
    out_bias: Tensor
    gate_scale: Tensor
    has_out_rotation: bool = False
    has_state_rotation: bool = False

    @property
    def hidden(self) -> int:
        """Width of the residual stream (d_model)."""
        return self.out.shape[0]

    @property
    def dim(self) -> int:
        """Inner width (d_inner)."""
        return self.out.shape[1]

    @property
    def dstate(self) -> int:
        """States per channel."""
        return self.A.shape[1]

    @property
    def dt_rank(self) -> int:
        """Width between x_proj and dt_proj."""
        return self.dt.shape[1]

    @property
    def width(self) -> int:
        """Taps of the causal convolution."""
        return self.conv.shape[1]

    def replace(self, **changes: object) -> MixerWeights:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def map(self, function: Callable[[Tensor], Tensor]) -> MixerWeights:
        """A copy with `function` applied to every tensor."""
        return _map_tensors(self, function)

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
        layers = tuple(layer.to(dtype) for layer in self.layers)
        return _map_tensors(self, lambda tensor: tensor.to(dtype)).replace(layers=layers)


_Weights = TypeVar("_Weights", MixerWeights, LanguageModelWeights)


def _map_tensors(weights: _Weights, function: Callable[[Tensor], Tensor]) -> _Weights:
    changes: dict[str, Any] = {
        field.name: function(value)
        for field in dataclasses.fields(weights)
        if isinstance(value := getattr(weights, field.name), Tensor)
    }
    return dataclasses.replace(weights, **changes)
