"""Bench cases of selective_scan and its update.

There is no float baseline: a loop over time in eager torch is two orders of magnitude slower.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import BenchCase
from bench.shapes import DECODE_TOKENS, MODELS, PREFILL_TOKENS, LayerShape
from mambaquant_ext import ops

Arguments = dict[str, torch.Tensor]

# Per channel and state, a multiply-add counting as two: exp2 16, recurrence 3, read-out 2. The
# quantized read-out adds scaling, rounding and clamps, the rotation log2(dstate) additions. Per
# channel: softplus, skip and gate.
OPERATIONS_PER_STATE = {"float": 21, "int8": 25, "rotated int8": 29}
OPERATIONS_PER_CHANNEL = 60
CHECKED_TOKENS = 16  # the reference loops over time


def _arguments(model: LayerShape, batch: int, seqlen: int) -> Arguments:
    dim, dstate = model.dim, model.dstate
    wide = torch.randint(-127, 128, (batch, seqlen, 2 * dim), dtype=torch.int8)
    states = torch.randint(-127, 128, (batch, seqlen, 2 * dstate), dtype=torch.int8)
    return {
        "x": torch.randint(-127, 128, (batch, seqlen, dim), dtype=torch.int8),
        "x_scale": torch.rand(dim) * 0.02 + 0.001,
        "x_zero_point": torch.full((dim,), -100, dtype=torch.int32),
        "dt": torch.randn(batch, seqlen, dim) - 3,
        "dt_bias": torch.randn(dim),
        "A": -torch.arange(1.0, dstate + 1)[:, None].repeat(1, dim),
        "B": states[..., :dstate],
        "B_scale": torch.rand(dstate) * 0.02,
        "C": states[..., dstate:],
        "C_scale": torch.tensor([0.01]),
        "D": torch.randn(dim),
        "z": wide[..., dim:],
        "z_scale": torch.rand(dim) * 0.03,
        "gate_scale": torch.rand(dim) + 0.5,
    }


def _with_readout(arguments: Arguments, readout: str) -> Arguments:
    if readout == "float":
        return arguments
    scale = torch.full_like(arguments["x_scale"], 0.02)
    return {**arguments, "readout_scale": scale, "rotate_state": readout == "rotated int8"}


def _check(arguments: Arguments) -> None:
    """The first tokens, against float64, on all but 1 % of the elements (roundings that flip)."""
    from tests.reference import selective_scan as reference

    sequences = {"x", "dt", "B", "C", "z"}
    short = {k: v[:, :CHECKED_TOKENS] if k in sequences else v for k, v in arguments.items()}
    y, state = ops.selective_scan(**short)
    expected_y, expected_state = reference.selective_scan(**short)
    for actual, expected in ((y, expected_y), (state, expected_state)):
        close = (actual - expected).abs() <= 1e-5 * expected.abs().max()
        assert close.double().mean() >= 0.99


def _bytes(model: LayerShape, tokens: int, sequences: int) -> int:
    """x and z int8, dt and y float32, B and C int8; the float32 state in and out."""
    return tokens * (10 * model.dim + 2 * model.dstate) + 8 * sequences * model.dstate * model.dim


def _operations(model: LayerShape, tokens: int, readout: str) -> int:
    per_channel = OPERATIONS_PER_STATE[readout] * model.dstate + OPERATIONS_PER_CHANNEL
    return tokens * model.dim * per_channel


def _prefill(model: LayerShape, seqlen: int, readout: str) -> BenchCase:
    arguments = _with_readout(_arguments(model, 1, seqlen), readout)
    return BenchCase(
        "selective_scan",
        f"{model.name} {seqlen}x{model.dim} {readout}",
        lambda: ops.selective_scan(**arguments),
        lambda: _check(arguments),
        bytes_moved=_bytes(model, seqlen, 1),
        operations=_operations(model, seqlen, readout),
    )


def _decode(model: LayerShape, batch: int, readout: str) -> BenchCase:
    arguments = _with_readout(_arguments(model, batch, 1), readout)
    sequences = {"x", "dt", "B", "C", "z"}
    step = {k: v[:, 0] if k in sequences else v for k, v in arguments.items()}
    state = torch.zeros(batch, model.dstate, model.dim)
    return BenchCase(
        "selective_scan_update",
        f"{model.name} batch {batch} {readout}",
        lambda: ops.selective_scan_update(state, **step),
        lambda: _check(arguments),
        bytes_moved=_bytes(model, batch, batch),
        operations=_operations(model, batch, readout),
    )


def cases(preset: str) -> Iterator[BenchCase]:
    """Prefill of one sequence and single-token updates, with each read-out."""
    for model in MODELS[preset]:
        for readout in OPERATIONS_PER_STATE:
            for seqlen in PREFILL_TOKENS[preset]:
                yield _prefill(model, seqlen, readout)
            for batch in DECODE_TOKENS[preset]:
                yield _decode(model, batch, readout)
