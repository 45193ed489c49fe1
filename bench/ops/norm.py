"""Bench cases of rmsnorm_quantize and layernorm_quantize."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import EAGER, BenchCase
from bench.shapes import DECODE_TOKENS, MODELS, PREFILL_TOKENS
from mambaquant_ext import ops

# Vector instructions of an element's multiplies and adds: square-add, two multiplies, the scale.
OPERATIONS = 6


def cases(preset: str) -> Iterator[BenchCase]:
    """RMSNorm with a residual, static; without one, dynamic; LayerNorm, static."""
    for model in MODELS[preset]:
        for tokens in (*DECODE_TOKENS[preset], *PREFILL_TOKENS[preset]):
            for dtype in (torch.float32, torch.float16):
                yield from _shape_cases(model.name, tokens, model.hidden, dtype)


def _shape_cases(model: str, tokens: int, dim: int, dtype: torch.dtype) -> Iterator[BenchCase]:
    from tests.reference import norm as reference
    from tests.tolerances import assert_int8_close

    x = torch.randn(tokens, dim).to(dtype)
    residual = torch.randn(tokens, dim)
    weight, bias = torch.rand(dim) + 0.5, torch.randn(dim)
    scale = torch.tensor([0.03])
    label = f"{model} {tokens}x{dim} {str(dtype).removeprefix('torch.')}"
    width = x.element_size()

    def check_rms() -> None:
        q = ops.rmsnorm_quantize(x, weight, residual, scale)[0]
        assert_int8_close(q, reference.norm_quantize(x, weight, None, residual, scale)[0])

    def check_dynamic() -> None:
        assert_int8_close(ops.rmsnorm_quantize(x)[0], reference.norm_quantize(x)[0])

    def check_layer() -> None:
        q = ops.layernorm_quantize(x, weight, bias, None, scale)[0]
        expected = reference.norm_quantize(x, weight, bias, scale=scale, subtract_mean=True)[0]
        assert_int8_close(q, expected)

    def torch_rms() -> tuple[torch.Tensor, torch.Tensor]:
        s = x.float() + residual
        y = torch.nn.functional.rms_norm(s, (dim,), weight, 1e-5)
        return (y * (1 / scale)).round().clamp(-127, 127).to(torch.int8), s

    def torch_layer() -> torch.Tensor:
        y = torch.nn.functional.layer_norm(x.float(), (dim,), weight, bias, 1e-5)
        return (y * (1 / scale)).round().clamp(-127, 127).to(torch.int8)

    copies = torch.empty_like(x)
    yield BenchCase(
        "rmsnorm_quantize",
        f"{label} residual static",
        lambda: ops.rmsnorm_quantize(x, weight, residual, scale),
        check_rms,
        bytes_moved=(width + 9) * x.numel(),
        operations=(OPERATIONS + 1) * x.numel(),
        baselines={EAGER: torch_rms},
    )
    yield BenchCase(
        "rmsnorm_quantize",
        f"{label} dynamic",
        lambda: ops.rmsnorm_quantize(x),
        check_dynamic,
        bytes_moved=(width + 1) * x.numel(),
        operations=OPERATIONS * x.numel(),
        baselines={"copy": lambda: copies.copy_(x)},
    )
    yield BenchCase(
        "layernorm_quantize",
        f"{label} static",
        lambda: ops.layernorm_quantize(x, weight, bias, None, scale),
        check_layer,
        bytes_moved=(width + 1) * x.numel(),
        operations=(OPERATIONS + 4) * x.numel(),
        baselines={EAGER: torch_layer},
    )
