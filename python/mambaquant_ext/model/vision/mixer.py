"""The Mamba-1 mixer as the public vision checkpoints name its parts, in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.parts import selective_scan

# Steps at initialisation are log-uniform between these two (Gu and Dao 2023, section 3.6).
_DT_MIN, _DT_MAX = 1e-3, 1e-1


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerSizes:
    """Sizes of a mixer.

    Attributes:
        hidden: width of a token.
        dim: inner width.
        dstate: states per inner channel.
        dt_rank: width between x_proj and dt_proj.
        width: taps of the causal convolution.
        has_in_bias: in_proj has a bias.
        has_out_bias: out_proj has a bias.
        has_conv_bias: conv1d has a bias.
    """

    hidden: int
    dim: int
    dstate: int
    dt_rank: int
    width: int
    has_in_bias: bool = False
    has_out_bias: bool = False
    has_conv_bias: bool = True


class ScanInputs(NamedTuple):
    """What the scan reads.

    Attributes:
        x: (batch, seqlen, dim).
        delta: (batch, seqlen, dim), after softplus.
        B: (batch, seqlen, dstate).
        C: (batch, seqlen, dstate).
    """

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor

    def flip(self) -> ScanInputs:
        """The same with the tokens in the reverse order."""
        return ScanInputs(*(tensor.flip(1) for tensor in self))


@dataclass(frozen=True, slots=True)
class Branch:
    """The weights that one walk over the tokens uses, between in_proj and the gate.

    Attributes:
        conv1d: depthwise, causal: padded by width - 1 on both sides.
        x_proj: makes dt, B and C.
        dt_proj: makes delta, before softplus.
        A_log: (dim, dstate), log(-A).
        D: (dim,).
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor

    def inputs(self, x: Tensor) -> ScanInputs:
        """Convolution, SiLU and the two projections (algorithm section 1.1, 2-5).

        Args:
            x: (batch, seqlen, dim), the tokens in the order of the walk.
        """
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        rank, dstate = self.dt_proj.in_features, self.A_log.shape[1]
        dt, B, C = self.x_proj(x).split([rank, dstate, dstate], -1)
        return ScanInputs(x, F.softplus(self.dt_proj(dt)), B, C)

    def scan(self, inputs: ScanInputs) -> Tensor:
        """The recurrence from a zero state, its read-out and skip.

        Args:
            inputs: in the order of the walk.

        Returns:
            (batch, seqlen, dim), before the gate.
        """
        A = -torch.exp(self.A_log)
        return selective_scan(inputs.x, inputs.delta, A, inputs.B, inputs.C, self.D)[0]


class MambaMixer(nn.Module):
    """Mamba-1: one walk, first token to last (algorithm section 1.1).

    Source: Gu and Dao 2023, figure 3; names of the parameters as in mamba_ssm.
    """

    def __init__(self, sizes: MixerSizes) -> None:
        """Weights as at the start of training.

        Args:
            sizes: of every weight.
        """
        super().__init__()
        self.in_proj = nn.Linear(sizes.hidden, 2 * sizes.dim, bias=sizes.has_in_bias)
        self.conv1d = causal_conv1d(sizes)
        self.x_proj = x_projection(sizes)
        self.dt_proj = dt_projection(sizes)
        self.A_log = nn.Parameter(initial_A_log(sizes))
        self.D = nn.Parameter(torch.ones(sizes.dim))
        self.out_proj = nn.Linear(sizes.dim, sizes.hidden, bias=sizes.has_out_bias)

    @property
    def branch(self) -> Branch:
        """The weights of the forward walk."""
        return Branch(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The mixer without norm and residual add.

        Args:
            hidden_states: (batch, seqlen, hidden), normalised.

        Returns:
            (batch, seqlen, hidden).
        """
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        y = self.branch.scan(self.branch.inputs(x))
        out: Tensor = self.out_proj(y * F.silu(z))
        return out


def causal_conv1d(sizes: MixerSizes) -> nn.Conv1d:
    """A depthwise convolution whose first seqlen outputs are causal.

    Args:
        sizes: of the mixer.
    """
    dim, width = sizes.dim, sizes.width
    return nn.Conv1d(dim, dim, width, groups=dim, padding=width - 1, bias=sizes.has_conv_bias)


def x_projection(sizes: MixerSizes) -> nn.Linear:
    """The projection that makes dt, B and C, rows in this order.

    Args:
        sizes: of the mixer.
    """
    return nn.Linear(sizes.dim, sizes.dt_rank + 2 * sizes.dstate, bias=False)


def dt_projection(sizes: MixerSizes) -> nn.Linear:
    """The projection that makes delta; softplus of its bias is a sensible step.

    Args:
        sizes: of the mixer.
    """
    projection = nn.Linear(sizes.dt_rank, sizes.dim)
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    step = torch.exp(torch.rand(sizes.dim) * (high - low) + low)
    with torch.no_grad():
        projection.weight.uniform_(-(sizes.dt_rank**-0.5), sizes.dt_rank**-0.5)
        projection.bias.copy_(torch.log(torch.expm1(step)))
    return projection


def initial_A_log(sizes: MixerSizes) -> Tensor:
    """log(1), log(2), ..., log(dstate) for every channel.

    Args:
        sizes: of the mixer.

    Returns:
        (dim, dstate).
    """
    return torch.log(torch.arange(1.0, sizes.dstate + 1)).repeat(sizes.dim, 1)
