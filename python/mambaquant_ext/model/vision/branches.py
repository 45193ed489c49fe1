"""Selective scans that share their input: one set of weights a branch, stacked as VMamba's family stores them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.parts import selective_scan

# Mamba's start for the step: softplus(dt_bias) is log-uniform between these.
DT_MIN, DT_MAX = 1e-3, 1e-1


def initial_dt_bias(shape: tuple[int, ...]) -> Tensor:
    """Random biases whose softplus lies between DT_MIN and DT_MAX.

    Args:
        shape: of the result.

    Source: Mamba, section 3.6.
    """
    log_step = torch.rand(shape) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN)
    return torch.log(torch.expm1(log_step.exp()))


class SelectiveBranches(nn.Module):
    """x_proj, dt_proj and scan of several branches, each with its own weights.

    The rows of x_proj_weight[k] make dt, B and C, in this order. A_logs and Ds hold the branches one after the other.

    Attributes:
        x_proj_weight: (branches, dt_rank + 2 dstate, dim).
        dt_projs_weight: (branches, dim, dt_rank).
        dt_projs_bias: (branches, dim).
        A_logs: (branches * dim, dstate), A = -exp(A_logs).
        Ds: (branches * dim,).
    """

    def __init__(self, *, branches: int, dim: int, dt_rank: int, dstate: int) -> None:
        super().__init__()
        self.branches, self.dim, self.dt_rank, self.dstate = branches, dim, dt_rank, dstate
        bound = dim**-0.5
        self.x_proj_weight = nn.Parameter(
            torch.empty(branches, dt_rank + 2 * dstate, dim).uniform_(-bound, bound)
        )
        bound = dt_rank**-0.5
        self.dt_projs_weight = nn.Parameter(
            torch.empty(branches, dim, dt_rank).uniform_(-bound, bound)
        )
        self.dt_projs_bias = nn.Parameter(initial_dt_bias((branches, dim)))
        rates = torch.arange(1, dstate + 1, dtype=torch.get_default_dtype())
        self.A_logs = nn.Parameter(rates.log().repeat(branches * dim, 1))
        self.Ds = nn.Parameter(torch.ones(branches * dim))

    def scan_branch(self, branch: int, x: Tensor) -> Tensor:
        """The scan of one branch over a sequence, from a zero state, with the skip D x.

        Args:
            branch: in [0, branches).
            x: (batch, seqlen, dim), in the order of the scan.

        Returns:
            y: (batch, seqlen, dim), in the same order.
        """
        channels = slice(branch * self.dim, (branch + 1) * self.dim)
        sizes = [self.dt_rank, self.dstate, self.dstate]
        dt, B, C = F.linear(x, self.x_proj_weight[branch]).split(sizes, -1)
        delta = F.softplus(F.linear(dt, self.dt_projs_weight[branch], self.dt_projs_bias[branch]))
        return selective_scan(x, delta, -self.A_logs[channels].exp(), B, C, self.Ds[channels])[0]
