"""Bench cases of selective_scan and its update.

The baselines of a prefill are float32 programs of torch on a CPU (torch_scan), and mamba_ssm's kernels in float16 on a
GPU, where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.harness import BenchCase, optional
from bench.ops.torch_scan import float_scans
from bench.shapes import DECODE_TOKENS, MODELS, PREFILL_TOKENS, VIM_GRID, VIM_TINY, LayerShape
from mambaquant_ext import ops

Arguments = dict[str, torch.Tensor]

# Per channel and state, a multiply-add counting as two: exp2 11, recurrence 4, read-out 2. The
# quantized read-out adds a clamp and rounding, the rotation log2(dstate) additions. Per channel:
# softplus, skip and gate.
OPERATIONS_PER_STATE = {"float": 17, "int8": 20, "rotated int8": 24}
OPERATIONS_PER_CHANNEL = 60
CHECKED_CHANNELS = 64  # of every token; the reference loops over time
WITHOUT_CHANNEL = {"B", "B_scale", "C", "C_scale", "order"}
IMAGES = 8


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


def _check(run: Callable[[], object], arguments: Arguments, state: torch.Tensor | None) -> None:
    """Some channels of every token, against float64, on all but 1 % of the elements (roundings that flip)."""
    from tests.reference import selective_scan as reference

    dim = arguments["x"].shape[-1]
    some = torch.linspace(0, dim - 1, min(dim, CHECKED_CHANNELS)).long()
    fewer = {
        k: v[..., some] if isinstance(v, torch.Tensor) and k not in WITHOUT_CHANNEL else v
        for k, v in arguments.items()
    }
    initial = None if state is None else state[..., some]
    expected = reference.selective_scan(**fewer, initial_state=initial)
    for actual, wanted in zip(run(), expected, strict=True):
        close = (actual[..., some] - wanted).abs() <= 1e-5 * wanted.abs().max()
        assert close.double().mean() >= 0.99, f"{close.double().mean():.2%} are close"


def _float_prefill(arguments: Arguments) -> dict[str, Callable[[], object]]:
    """Of mamba_ssm, a GPU package, where it is installed."""
    function = optional("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    if function is None:
        return {}
    # Channels first and contiguous, as it wants them.
    inputs = ((arguments[k] * 0.01).half() for k in ("x", "dt", "B", "C", "z"))
    u, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in inputs)
    A, D, bias = arguments["A"].T.contiguous(), arguments["D"], arguments["dt_bias"]
    return {"mamba_ssm float16": lambda: function(u, dt, A, B, C, D, z, bias, True)}


def _float_decode(step: Arguments) -> dict[str, Callable[[], object]]:
    function = optional("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    if function is None or not step["x"].is_cuda:
        return {}
    x, dt, B, C, z = ((step[k] * 0.01).half() for k in ("x", "dt", "B", "C", "z"))
    A, D, bias = step["A"].T.contiguous(), step["D"], step["dt_bias"]
    state = torch.zeros(x.shape[0], *A.shape)
    return {
        "mamba_ssm float16": lambda: function(state, x, dt, A, B, C, D, z, bias, dt_softplus=True)
    }


def _bytes(model: LayerShape, tokens: int, sequences: int) -> int:
    """x and z int8, dt and y float32, B and C int8; the float32 state in and out."""
    return tokens * (10 * model.dim + 2 * model.dstate) + 8 * sequences * model.dstate * model.dim


def _operations(model: LayerShape, tokens: int, readout: str) -> int:
    per_channel = OPERATIONS_PER_STATE[readout] * model.dstate + OPERATIONS_PER_CHANNEL
    return tokens * model.dim * per_channel


def prefill_case(model: LayerShape, seqlen: int, readout: str, preset: str) -> BenchCase:
    """One sequence of a layer, with the read-out "float", "int8" or "rotated int8"."""
    arguments = _with_readout(_arguments(model, 1, seqlen), readout)
    return BenchCase(
        "selective_scan",
        f"{model.name} {seqlen}x{model.dim} {readout}",
        lambda: ops.selective_scan(**arguments),
        lambda: _check(lambda: ops.selective_scan(**arguments), arguments, None),
        bytes_moved=_bytes(model, seqlen, 1),
        operations=_operations(model, seqlen, readout),
        baselines=(
            _float_prefill(arguments)
            if arguments["x"].is_cuda
            else float_scans(arguments, compiled=preset == "cpu")
        ),
    )


def _image(readout: str) -> BenchCase:
    """Column by column over images in row-major storage, joining what another route has given."""
    height, width = VIM_GRID
    tokens = IMAGES * height * width
    arguments = _with_readout(_arguments(VIM_TINY, IMAGES, height * width), readout)
    order = torch.arange(height * width, dtype=torch.int32).view(height, width).T.flatten()
    addend = torch.randn(IMAGES, height * width, VIM_TINY.dim)
    routed = {**arguments, "order": order, "addend": addend}
    return BenchCase(
        "selective_scan",
        f"{VIM_TINY.name} {IMAGES}x{height}x{width}x{VIM_TINY.dim} by columns, addend {readout}",
        lambda: ops.selective_scan(**routed),
        lambda: _check(lambda: ops.selective_scan(**routed), routed, None),
        bytes_moved=_bytes(VIM_TINY, tokens, IMAGES) + 4 * tokens * VIM_TINY.dim,
        operations=_operations(VIM_TINY, tokens, readout),
    )


def _decode(model: LayerShape, batch: int, readout: str) -> BenchCase:
    arguments = _with_readout(_arguments(model, batch, 1), readout)
    sequences = {"x", "dt", "B", "C", "z"}
    step = {k: v[:, 0] if k in sequences else v for k, v in arguments.items()}
    state = torch.randn(batch, model.dstate, model.dim)

    def checked_step() -> tuple[torch.Tensor, torch.Tensor]:
        after = state.clone()
        return ops.selective_scan_update(after, **step)[:, None], after

    return BenchCase(
        "selective_scan_update",
        f"{model.name} batch {batch} {readout}",
        lambda: ops.selective_scan_update(state, **step),
        lambda: _check(checked_step, arguments, state),
        bytes_moved=_bytes(model, batch, batch),
        operations=_operations(model, batch, readout),
        baselines=_float_decode(step),
    )


def cases(preset: str) -> Iterator[BenchCase]:
    """Prefill of one sequence, single-token updates and images, with each read-out."""
    for model in MODELS[preset]:
        for readout in OPERATIONS_PER_STATE:
            for seqlen in PREFILL_TOKENS[preset]:
                yield prefill_case(model, seqlen, readout, preset)
            for batch in DECODE_TOKENS[preset]:
                yield _decode(model, batch, readout)
    for readout in OPERATIONS_PER_STATE:
        yield _image(readout)
