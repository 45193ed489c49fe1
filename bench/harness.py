"""Timing of one case: a checked kernel beside its baselines, interleaved, in one process.

A case says what it moves and computes, so that every figure can be held against the machine's own
roof, which is measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class BenchCase:
    """One operator at one shape.

    check() compares with the float64 reference and raises; a wrong kernel has no speed. bytes_moved
    counts each input once and each output once; operations counts a multiply and an add as two.
    """

    op: str
    shape: str
    run: Callable[[], object]
    check: Callable[[], None]
    bytes_moved: int
    operations: int
    baselines: dict[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median_us: float
    lower_us: float
    upper_us: float


def interleave(
    runs: dict[str, Callable[[], object]], seconds: float = 0.5, minimum_rounds: int = 7
) -> dict[str, Timing]:
    """Times the callables in turn, A B C A B C ...: a drift of the machine meets all of them.

    Each round calls one callable often enough to last about a millisecond.
    """
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < deadline or len(samples[next(iter(runs))]) < minimum_rounds:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name] * 1e6)
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(values, n=4)
    return Timing(median, lower, upper)


def copy_bandwidth(size_bytes: int = 1 << 28) -> float:
    """Bytes per second of a large copy, read and write counted: the roof of byte-bound kernels."""
    source = torch.ones(size_bytes // 4)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, seconds=1.0)["copy"]
    return 2 * size_bytes / (timing.lower_us * 1e-6)


def int8_gemm_rate(size: int = 2048) -> float:
    """Operations per second of torch._int_mm: the roof of arithmetic-bound int8 kernels."""
    a = torch.ones(size, size, dtype=torch.int8)
    b = torch.ones(size, size, dtype=torch.int8).T
    timing = interleave({"gemm": lambda: torch._int_mm(a, b)}, seconds=1.0)["gemm"]
    return 2 * size**3 / (timing.lower_us * 1e-6)


def measure(case: BenchCase, seconds: float = 0.5) -> dict[str, Timing]:
    """Checks the case, then times it as "ours" beside its baselines."""
    case.check()
    return interleave({"ours": case.run, **case.baselines}, seconds)


def all_cases(preset: str) -> Iterator[BenchCase]:
    """Every case of every group; preset is "quick" or "full"."""
    from bench import ops

    for module in ops.MODULES:
        yield from module.cases(preset)
