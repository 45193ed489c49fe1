"""Bench cases of causal_conv1d_quantize and its update."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.harness import EAGER, BenchCase, optional
from bench.shapes import DECODE_TOKENS, MODELS, PREFILL_TOKENS, LayerShape
from mambaquant_ext import ops

# Per element: the taps' multiply-adds, and 16 for scaling, bias, SiLU and rounding.
OPERATIONS_BESIDE_TAPS = 16


def _arguments(model: LayerShape, batch: int, seqlen: int) -> dict[str, torch.Tensor]:
    """The left half of in_proj's output, as a model hands it over."""
    dim = model.dim
    wide = torch.randint(-127, 128, (batch, seqlen, 2 * dim), dtype=torch.int8)
    return {
        "x": wide[..., :dim],
        "x_scale": torch.rand(dim) * 0.02 + 0.01,
        "weight": torch.randint(-127, 128, (model.width, dim), dtype=torch.int8),
        "weight_scale": torch.rand(dim) * 0.004 + 0.001,
        "bias": torch.randn(dim),
        "out_scale": torch.rand(dim) * 0.02 + 0.02,
        "out_zero_point": torch.full((dim,), -100, dtype=torch.int32),
    }


def _check(arguments: dict[str, torch.Tensor]) -> None:
    from tests.reference import conv1d as reference
    from tests.tolerances import assert_int8_close

    q, state = ops.causal_conv1d_quantize(**arguments)
    expected_q, expected_state = reference.causal_conv1d_quantize(**arguments)
    assert_int8_close(q, expected_q)
    assert torch.equal(state, expected_state)


def _check_update(x: torch.Tensor, state: torch.Tensor, arguments: dict[str, torch.Tensor]) -> None:
    from tests.reference import conv1d as reference
    from tests.tolerances import assert_int8_close

    expected_q, expected_state = reference.causal_conv1d_quantize(
        x[:, None], **arguments, initial_state=state.clone()
    )
    q = ops.causal_conv1d_update_quantize(x, state, **arguments)
    assert_int8_close(q, expected_q[:, 0])
    assert torch.equal(state, expected_state)


def _float_prefill(model: LayerShape, seqlen: int) -> dict[str, Callable[[], object]]:
    """Of causal_conv1d, a GPU package, where it is installed."""
    function = optional("causal_conv1d", "causal_conv1d_fn")
    if function is None:
        return {}
    x = torch.randn(1, seqlen, model.dim).half().transpose(1, 2)  # token-major, as ours
    weight, bias = torch.randn(model.dim, model.width).half(), torch.randn(model.dim).half()
    return {"causal_conv1d float16": lambda: function(x, weight, bias, activation="silu")}


def _float_decode(model: LayerShape, batch: int) -> dict[str, Callable[[], object]]:
    function = optional("causal_conv1d", "causal_conv1d_update")
    if function is None:
        return {}
    x, state = torch.randn(batch, model.dim).half(), torch.zeros(batch, model.dim, model.width)
    weight, bias = torch.randn(model.dim, model.width).half(), torch.randn(model.dim).half()
    state = state.half()
    return {"causal_conv1d float16": lambda: function(x, state, weight, bias, activation="silu")}


def _operations(model: LayerShape, elements: int) -> int:
    return (2 * model.width + OPERATIONS_BESIDE_TAPS) * elements


def _prefill(model: LayerShape, seqlen: int) -> BenchCase:
    arguments = _arguments(model, 1, seqlen)
    x = torch.randn(1, model.dim, seqlen)
    weight, bias = torch.randn(model.dim, 1, model.width), torch.randn(model.dim)
    out_scale, zero_point = arguments["out_scale"], arguments["out_zero_point"]

    def convolve(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv1d(x, weight, bias, padding=model.width - 1, groups=model.dim)
        return torch.nn.functional.silu(y[..., :seqlen])

    def torch_int8() -> torch.Tensor:
        floating = (arguments["x"].float() * arguments["x_scale"]).transpose(1, 2)
        q = (convolve(floating).transpose(1, 2) / out_scale + zero_point).round()
        return q.clamp(-128, 127).to(torch.int8)

    elements = seqlen * model.dim
    return BenchCase(
        "causal_conv1d_quantize",
        f"{model.name} {seqlen}x{model.dim}",
        lambda: ops.causal_conv1d_quantize(**arguments),
        lambda: _check(arguments),
        bytes_moved=2 * elements,
        operations=_operations(model, elements),
        baselines={
            "torch float32": lambda: convolve(x),
            EAGER: torch_int8,
            **(_float_prefill(model, seqlen) if x.is_cuda else {}),
        },
    )


def _decode(model: LayerShape, batch: int) -> BenchCase:
    arguments = _arguments(model, batch, 1)
    x = arguments.pop("x")[:, 0]
    state = torch.randint(-127, 128, (batch, model.width - 1, model.dim), dtype=torch.int8)
    elements = batch * model.dim
    return BenchCase(
        "causal_conv1d_update_quantize",
        f"{model.name} batch {batch}",
        lambda: ops.causal_conv1d_update_quantize(x, state, **arguments),
        lambda: _check_update(x, state, arguments),
        bytes_moved=2 * model.width * elements,
        operations=_operations(model, elements),
        baselines=_float_decode(model, batch) if x.is_cuda else {},
    )


def cases(preset: str) -> Iterator[BenchCase]:
    """Prefill of one sequence and single-token updates."""
    for model in MODELS[preset]:
        for seqlen in PREFILL_TOKENS[preset]:
            yield _prefill(model, seqlen)
        for batch in DECODE_TOKENS[preset]:
            yield _decode(model, batch)
