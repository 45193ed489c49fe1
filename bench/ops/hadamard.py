"""Bench cases of hadamard_transform and hadamard_quantize."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from bench.harness import EAGER, BenchCase, optional
from bench.shapes import DECODE_TOKENS, MODELS, PREFILL_TOKENS
from mambaquant_ext import ops

CHECKED_ROWS = 64  # of a long input: a row's result does not depend on the others


def additions(dim: int) -> int:
    """Additions and subtractions of one row: butterflies, and the base in groups of four blocks."""
    odd = dim // (dim & -dim)
    order = 1 if odd == 1 else 4 * odd
    # 14 for the sums of a group of four, order / 4 - 1 for an output.
    base = 0.0 if odd == 1 else 14 / 4 + order / 4 - 1
    return int(dim * (math.log2(dim // order) + base))


def _float_transform(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Of fast_hadamard_transform, a GPU package, where it is installed and has the size."""
    dim = x.shape[1]
    odd = dim // (dim & -dim)
    name = {1: "hadamard_transform", 3: "hadamard_transform_12N", 5: "hadamard_transform_20N",
            7: "hadamard_transform_28N"}.get(odd)  # fmt: skip
    function = optional("fast_hadamard_transform", name) if name and x.is_cuda else None
    if function is None:
        return {}
    return {"fast_hadamard_transform": lambda: function(x, dim**-0.5)}


def cases(preset: str) -> Iterator[BenchCase]:
    """The rotation before the output projection, static and dynamic; the plain transform."""
    for model in MODELS[preset]:
        for tokens in (*DECODE_TOKENS[preset], *PREFILL_TOKENS[preset]):
            for dtype in (torch.float32, torch.float16):
                yield from _shape_cases(model.name, tokens, model.dim, dtype)


def _shape_cases(model: str, tokens: int, dim: int, dtype: torch.dtype) -> Iterator[BenchCase]:
    from tests.reference import hadamard as reference
    from tests.tolerances import assert_int8_close

    x = torch.randn(tokens, dim).to(dtype)
    scale = torch.tensor([0.03])
    label = f"{model} {tokens}x{dim} {str(dtype).removeprefix('torch.')}"
    width = x.element_size()
    matrix = ops.hadamard_matrix(dim, torch.float32)
    copies = torch.empty_like(x)
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS)).long()

    def check_static() -> None:
        q = ops.hadamard_quantize(x, scale)[0][rows]
        assert_int8_close(q, reference.hadamard_quantize(x[rows], scale)[0])

    def check_dynamic() -> None:
        q = ops.hadamard_quantize(x)[0][rows]
        assert_int8_close(q, reference.hadamard_quantize(x[rows])[0])

    def check_transform() -> None:
        error = ops.hadamard_transform(x)[rows].double() - reference.transform(x[rows])
        assert error.abs().max() <= 8 * torch.finfo(dtype).eps * x.abs().max()

    baselines = {
        "copy": lambda: copies.copy_(x),
        "matmul": lambda: x.float() @ matrix,
        EAGER: lambda: (x.float() @ matrix * (1 / scale)).round().clamp(-127, 127).to(torch.int8),
    }
    for name, given_scale, check in (
        ("static", scale, check_static),
        ("dynamic", None, check_dynamic),
    ):
        yield BenchCase(
            "hadamard_quantize",
            f"{label} {name}",
            lambda given_scale=given_scale: ops.hadamard_quantize(x, given_scale),
            check,
            bytes_moved=(width + 1) * x.numel(),
            operations=tokens * (additions(dim) + 2 * dim),
            baselines=baselines if given_scale is not None else {},
        )
    yield BenchCase(
        "hadamard_transform",
        label,
        lambda: ops.hadamard_transform(x),
        check_transform,
        bytes_moved=2 * width * x.numel(),
        operations=tokens * (additions(dim) + dim),
        baselines=_float_transform(x),
    )
