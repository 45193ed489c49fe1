"""Bench cases of quantize, quantize_dynamic and dequantize."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import EAGER, BenchCase
from bench.shapes import MODELS, PREFILL_TOKENS
from mambaquant_ext import ops


def cases(preset: str) -> Iterator[BenchCase]:
    """Static per tensor, dynamic per token, and back."""
    from tests.reference import quantize as reference

    for model in MODELS[preset]:
        for tokens in PREFILL_TOKENS[preset]:
            x = torch.randn(tokens, model.dim)
            scale = torch.tensor([0.03])
            q = ops.quantize(x, scale)
            label = f"{model.name} {tokens}x{model.dim}"

            def check(x=x, scale=scale) -> None:
                assert torch.equal(ops.quantize(x, scale), reference.quantize(x, scale))

            def check_dynamic(x=x) -> None:
                # On a GPU torch divides by a number by multiplying by its reciprocal: the reference is the CPU's.
                with torch.device("cpu"):
                    expected = reference.quantize_dynamic(x.cpu(), 0)
                for a, b in zip(ops.quantize_dynamic(x, 0), expected, strict=True):
                    assert torch.equal(a.cpu(), b)

            def check_back(q=q, scale=scale) -> None:
                assert torch.equal(ops.dequantize(q, scale), reference.dequantize(q, scale))

            yield BenchCase(
                "quantize",
                label,
                lambda x=x, scale=scale: ops.quantize(x, scale),
                check,
                bytes_moved=5 * x.numel(),
                operations=4 * x.numel(),
                baselines={
                    EAGER: lambda x=x, scale=scale: (
                        (x * (1 / scale)).round().clamp(-127, 127).to(torch.int8)
                    )
                },
            )
            yield BenchCase(
                "quantize_dynamic",
                label,
                lambda x=x: ops.quantize_dynamic(x, 0),
                check_dynamic,
                bytes_moved=5 * x.numel(),
                operations=6 * x.numel(),
            )
            yield BenchCase(
                "dequantize",
                label,
                lambda q=q, scale=scale: ops.dequantize(q, scale),
                check_back,
                bytes_moved=5 * x.numel(),
                operations=2 * x.numel(),
                baselines={EAGER: lambda q=q, scale=scale: q.float() * scale},
            )
