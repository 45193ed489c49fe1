"""Bench cases of gemm, gemm_dequantize and gemm_requantize: the four linear layers of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.harness import EAGER, BenchCase
from bench.machine import cold_bytes
from bench.shapes import DECODE_TOKENS, MODELS, MORE_GEMM_TOKENS, PREFILL_TOKENS, LayerShape
from mambaquant_ext import ops

CHECKED_ROWS = 64  # of a long product: a row's result does not depend on the others


@dataclass(frozen=True)
class Linear:
    """One linear layer with data."""

    label: str
    a: torch.Tensor
    weight: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor
    out_scale: torch.Tensor


def _sizes(model: LayerShape) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear."""
    return {
        "in_proj": (2 * model.dim, model.hidden),
        "x_proj": (model.dt_rank + 2 * model.dstate, model.dim),
        "dt_proj": (model.dim, model.dt_rank),
        "out_proj": (model.hidden, model.dim),
    }


def _linears(preset: str, token_counts: list[int]) -> Iterator[Linear]:
    for model in MODELS[preset]:
        for layer, (n, k) in _sizes(model).items():
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            for tokens in token_counts:
                yield Linear(
                    f"{model.name} {layer} {tokens}x{n}x{k}",
                    torch.randint(-127, 128, (tokens, k), dtype=torch.int8),
                    weight,
                    torch.tensor([0.02]),
                    torch.rand(n) * 1e-3,
                    torch.rand(n) + 0.5,
                )


def _float16(a: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """What the layer costs unquantized on a GPU; a CPU's float16 is nobody's baseline."""
    if not a.is_cuda:
        return {}
    a_half, weight_half = a.half(), weight.half()
    return {"torch float16": lambda: a_half @ weight_half.T}


def _prefill(linear: Linear, has_eager: bool) -> Iterator[BenchCase]:
    from tests.reference import gemm as reference

    a, weight = linear.a, linear.weight
    (m, k), n = a.shape, weight.shape[0]
    scales = (linear.a_scale, linear.b_scale)
    packed = ops.pack_gemm_weight(weight)
    baselines = {
        "torch._int_mm, no epilogue": lambda: torch._int_mm(a, weight.T),
        **_float16(a, weight),
    }

    def torch_dequantized() -> torch.Tensor:
        return torch._int_mm(a, weight.T) * (linear.a_scale * linear.b_scale)

    def torch_requantized() -> torch.Tensor:
        return (torch_dequantized() / linear.out_scale).round().clamp(-127, 127).to(torch.int8)

    def case(
        op: str,
        run: Callable[[], torch.Tensor],
        expect: Callable[[torch.Tensor], torch.Tensor],
        out_bytes: int,
        eager: Callable[[], torch.Tensor],
    ) -> BenchCase:
        rows = torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).long()

        def check() -> None:
            assert torch.equal(run()[rows], expect(a[rows]))

        moved = m * k + n * k + m * n * out_bytes
        operations = 2 * m * n * k
        beside = {**baselines, EAGER: eager} if has_eager else baselines
        return BenchCase(op, linear.label, run, check, moved, operations, beside, arithmetic="int8")

    yield case(
        "gemm_dequantize",
        lambda: ops.gemm_dequantize(a, *packed, *scales),
        lambda rows: reference.gemm_dequantize(rows, weight, *scales),
        4,
        torch_dequantized,
    )
    yield case(
        "gemm_requantize",
        lambda: ops.gemm_requantize(a, *packed, *scales, linear.out_scale),
        lambda rows: reference.gemm_requantize(rows, weight, *scales, linear.out_scale),
        1,
        torch_requantized,
    )


def _decode(linear: Linear) -> Iterator[BenchCase]:
    """Cold weights, as in a model of many layers: each call takes the next of many copies.

    The baseline reads the same bytes, in the same turns.
    """
    from tests.reference import gemm as reference

    a, weight = linear.a, linear.weight
    (m, k), n = a.shape, weight.shape[0]
    scales = (linear.a_scale, linear.b_scale)
    packed, layout = ops.pack_gemm_weight(weight)
    copies = packed.repeat(-(-cold_bytes() // packed.numel()), 1)
    plain = copies.view(torch.int64)
    turn = [0]

    def following() -> int:
        turn[0] = (turn[0] + 1) % len(copies)
        return turn[0]

    def run() -> torch.Tensor:
        return ops.gemm_dequantize(a, copies[following()], layout, *scales)

    def read() -> torch.Tensor:
        return plain[following()].sum()

    def check() -> None:
        assert torch.equal(run(), reference.gemm_dequantize(a, weight, *scales))

    moved = m * k + packed.numel() + 4 * m * n
    baselines = {"torch.sum of the same bytes": read, **_float16(a, weight)}
    label = f"{linear.label} cold"
    yield BenchCase(
        "gemm_dequantize",
        label,
        run,
        check,
        moved,
        2 * m * n * k,
        baselines,
        arithmetic="int8",
        working_set_bytes=copies.numel(),
    )


def cases(preset: str) -> Iterator[BenchCase]:
    """Prefill against torch's int8 product, with its epilogue at PREFILL_TOKENS alone; decode with cold weights."""
    for linear in _linears(preset, PREFILL_TOKENS[preset]):
        yield from _prefill(linear, has_eager=True)
    for linear in _linears(preset, MORE_GEMM_TOKENS.get(preset, [])):
        yield from _prefill(linear, has_eager=False)
    for linear in _linears(preset, DECODE_TOKENS[preset]):
        yield from _decode(linear)
