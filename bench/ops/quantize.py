"""Bench cases of quantize, quantize_dynamic and dequantize."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import BenchCase
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

            yield BenchCase(
                "quantize",
                label,
                lambda x=x, scale=scale: ops.quantize(x, scale),
                check,
                bytes_moved=5 * x.numel(),
                operations=4 * x.numel(),
                baselines={
                    "torch": lambda x=x, scale=scale: (
                        (x * (1 / scale)).round().clamp(-127, 127).to(torch.int8)
                    )
                },
            )
            yield BenchCase(
                "quantize_dynamic",
                label,
                lambda x=x: ops.quantize_dynamic(x, 0),
                check,
                bytes_moved=5 * x.numel(),
                operations=6 * x.numel(),
            )
            yield BenchCase(
                "dequantize",
                label,
                lambda q=q, scale=scale: ops.dequantize(q, scale),
                check,
                bytes_moved=5 * x.numel(),
                operations=2 * x.numel(),
                baselines={"torch": lambda q=q, scale=scale: q.float() * scale},
            )
