"""The Mamba-1 mixer in float, under mamba_ssm's names, and U-Mamba's layer around it for flattened maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.parts import selective_scan
from mambaquant_ext.model.vision.branches import initial_dt_bias


class MambaMixer(nn.Module):
    """in_proj, causal conv, SiLU, selective scan, gate, out_proj; parameters as in mamba_ssm.Mamba.

    Attributes:
        in_proj: hidden to 2 dim, x first, then z; no bias.
        conv1d: (dim, 1, width), with bias.
        x_proj: dim to dt_rank + 2 dstate: dt, B, C; no bias.
        dt_proj: dt_rank to dim, with bias.
        A_log: (dim, dstate), A = -exp(A_log).
        D: (dim,).
        out_proj: dim to hidden, no bias.

    Source: Gu and Dao, Mamba (arXiv 2312.00752); parameter names of state-spaces/mamba.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        dim = self.d_inner
        self.in_proj = nn.Linear(d_model, 2 * dim, bias=False)
        self.conv1d = nn.Conv1d(dim, dim, d_conv, groups=dim, padding=d_conv - 1)
        self.x_proj = nn.Linear(dim, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, dim)
        self.dt_proj.bias = nn.Parameter(initial_dt_bias((dim,)))
        rates = torch.arange(1, d_state + 1, dtype=torch.get_default_dtype())
        self.A_log = nn.Parameter(rates.log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, d_model, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The mixer's output, without norm and residual add.

        Args:
            hidden_states: (batch, seqlen, hidden).

        Returns:
            (batch, seqlen, hidden).
        """
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        padded: Tensor = self.conv1d(
            x.transpose(1, 2)
        )  # on both sides: what comes after is cut off
        x = F.silu(padded[..., : x.shape[1]].transpose(1, 2))
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta = F.softplus(self.dt_proj(dt))
        y, _ = selective_scan(x, delta, -self.A_log.exp(), B, C, self.D)
        out: Tensor = self.out_proj(y * F.silu(z))
        return out


class MambaLayer(nn.Module):
    """mamba(norm(x)) over the voxels of a map, without residual add.

    With channel tokens, a channel is a token and its voxels are the hidden dimension: U-Mamba does so where a map has
    no more voxels than channels.

    Attributes:
        norm: LayerNorm of the hidden dimension.
        mamba: the mixer.
    """

    def __init__(
        self, dim: int, *, dstate: int, conv_width: int, expand: int, channel_token: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = MambaMixer(dim, dstate, conv_width, expand)
        self.channel_token = channel_token

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: (batch, channels, *sides); channels, or with channel tokens the number of voxels, is dim.

        Returns:
            The same shape.
        """
        tokens = x.flatten(2) if self.channel_token else x.flatten(2).transpose(1, 2)
        y: Tensor = self.mamba(self.norm(tokens))
        return (y if self.channel_token else y.transpose(1, 2)).reshape(x.shape)
