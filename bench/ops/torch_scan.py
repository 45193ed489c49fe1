"""What torch offers for the selective scan on a CPU, in float32: loops over time, eager and compiled, and mambapy's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bench.harness import COMPILED, EAGER, optional

# Tokens of one call of the compiled loop. 8 are slower, 64 no quicker, and each takes its time to compile.
UNROLLED = 32

Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def advance(
    state: Tensor, A: Tensor, dt: Tensor, dtx: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens of the recurrence, one after another.

    Args:
        state: (dstate, dim), before the first of them.
        A: (dstate, dim).
        dt: (tokens, dim), behind its softplus.
        dtx: (tokens, dim), dt times the input.
        B: (tokens, dstate, 1).
        C: (tokens, dstate, 1).

    Returns:
        The state behind the last, and the read-outs, (tokens, dim).
    """
    ys = []
    for token in range(dt.shape[0]):
        state = torch.exp(dt[token] * A) * state + dtx[token] * B[token]
        ys.append((state * C[token]).sum(0))
    return state, torch.stack(ys)


def looped(A: Tensor, dt: Tensor, dtx: Tensor, B: Tensor, C: Tensor, step: Advance) -> Tensor:
    """The read-outs of a sequence, (seqlen, dim), UNROLLED tokens a call of step."""
    state, ys = torch.zeros_like(A), []
    for begin in range(0, len(dt), UNROLLED):
        part = slice(begin, begin + UNROLLED)
        state, y = step(state, A, dt[part], dtx[part], B[part], C[part])
        ys.append(y)
    return torch.cat(ys)


def parallel(
    pscan: Callable[[Tensor, Tensor], Tensor],
    A: Tensor,
    dt: Tensor,
    dtx: Tensor,
    B: Tensor,
    C: Tensor,
) -> Tensor:
    """As looped, by mambapy's scan over all tokens at once."""
    decay = torch.exp(dt[None, :, :, None] * A.T)
    states = pscan(decay, dtx[None, :, :, None] * B.mT)
    return (states @ C)[0, ..., 0]


def float_scans(arguments: Mapping[str, Tensor], compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """The whole operator on float32 inputs: softplus, recurrence, skip, gate. Roundings and scales are left out.

    Args:
        arguments: of selective_scan, one sequence.
        compiled: the loop compiled as well, at its first call.

    Returns:
        Name to callable; each gives (seqlen, dim).
    """
    x = (arguments["x"][0].float() - arguments["x_zero_point"]) * arguments["x_scale"]
    B = (arguments["B"][0].float() * arguments["B_scale"])[..., None]
    C = (arguments["C"][0].float() * arguments["C_scale"])[..., None]
    z = arguments["z"][0].float() * arguments["z_scale"]
    A, D, bias = arguments["A"], arguments["D"], arguments["dt_bias"]
    gate_scale, raw = arguments["gate_scale"], arguments["dt"][0]

    def whole(scan: Callable[..., Tensor]) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            dt = softplus(raw + bias)
            return (scan(A, dt, dt * x, B, C) + D * x) * (z * torch.sigmoid(gate_scale * z))

        return run

    found = {EAGER: whole(lambda *inputs: looped(*inputs, advance))}
    if compiled:
        quick = torch.compile(advance, dynamic=False)
        found[COMPILED] = whole(lambda *inputs: looped(*inputs, quick))
    pscan = optional("mambapy.pscan", "pscan")
    if pscan is not None:
        found["mambapy"] = whole(lambda *inputs: parallel(pscan, *inputs))
    return found
