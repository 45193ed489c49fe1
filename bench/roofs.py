"""The machine's own limits, measured in the run whose figures are held against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.harness import Timer, interleave
from bench.machine import cache_bytes, cold_bytes
from mambaquant_ext import ops

PROBE_SECONDS = 0.5
GEMM_SIZE = 2048
L3_PROBE_BYTES = 1 << 25  # a part of L3 that a machine shared with others still gives


@dataclass(frozen=True)
class Roofs:
    """What nothing on this machine does faster.

    Attributes:
        copy: bytes per second, read and written, of a copy that stays in L2, in L3, or in neither.
        arithmetic: operations per second of torch's int8 ("int8") and float32 matrix products.
        call_us: microseconds of an operator call that has next to nothing to do.
        read: bytes per second of reading main memory alone; None where it is not probed.
    """

    copy: dict[str, float]
    arithmetic: dict[str, float]
    call_us: float
    read: float | None = None

    def best(self, other: Roofs) -> Roofs:
        """The higher of both, roof by roof: a disturbed probe must not lower one."""
        return Roofs(
            {place: max(rate, other.copy[place]) for place, rate in self.copy.items()},
            {kind: max(rate, other.arithmetic[kind]) for kind, rate in self.arithmetic.items()},
            min(self.call_us, other.call_us),
            max((rate for rate in (self.read, other.read) if rate is not None), default=None),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def measure_roofs() -> Roofs:
    """Probes the machine with the threads that are set; a few seconds."""
    l2 = cache_bytes(2) * torch.get_num_threads() or 1 << 20
    sizes = {"L2": l2 // 2, "L3": max(L3_PROBE_BYTES, 4 * l2), "memory": 2 * cold_bytes()}
    copy = {place: copy_bandwidth(size // 2) for place, size in sizes.items()}
    arithmetic = {"int8": int8_gemm_rate(), "float32": float32_gemm_rate()}
    return Roofs(copy, arithmetic, call_microseconds(), read_bandwidth())


def copy_bandwidth(size_bytes: int, timer: Timer = interleave) -> float:
    """Bytes per second of a copy of so many bytes, read and write counted."""
    source = torch.ones(size_bytes // 4)
    target = torch.empty_like(source)
    timing = timer({"copy": lambda: target.copy_(source)}, PROBE_SECONDS)["copy"]
    return 2 * size_bytes / (timing.best_us * 1e-6)


@dataclass(frozen=True)
class Reader:
    """A call that reads so many bytes and writes next to nothing."""

    name: str
    size_bytes: int
    run: Callable[[], torch.Tensor]


def memory_readers(size_bytes: int | None = None) -> list[Reader]:
    """torch's quickest ways to read memory; which one that is differs from machine to machine.

    Args:
        size_bytes: of what is read again and again; None for more than any cache holds.
    """
    source = torch.ones((size_bytes or 2 * cold_bytes()) // 8, dtype=torch.float64)
    views = {
        "float64": source,
        "float32": source.view(torch.float32),
        "int64": source.view(torch.int64),
    }
    return [Reader(f"sum of {name}", source.nbytes, view.sum) for name, view in views.items()]


def read_bandwidth(timer: Timer = interleave) -> float:
    """Bytes per second of reading main memory, of the quickest reader."""
    readers = {reader.name: reader for reader in memory_readers()}
    timings = timer({name: reader.run for name, reader in readers.items()}, PROBE_SECONDS)
    return max(readers[name].size_bytes / (t.best_us * 1e-6) for name, t in timings.items())


def int8_gemm(size: int = GEMM_SIZE) -> Callable[[], torch.Tensor]:
    """A call of torch._int_mm, of 2 * size**3 operations."""
    a = torch.ones(size, size, dtype=torch.int8)
    b = torch.ones(size, size, dtype=torch.int8).T
    return lambda: torch._int_mm(a, b)


def int8_gemm_rate(size: int = GEMM_SIZE, timer: Timer = interleave) -> float:
    """Operations per second of torch._int_mm."""
    timing = timer({"gemm": int8_gemm(size)}, PROBE_SECONDS)["gemm"]
    return 2 * size**3 / (timing.best_us * 1e-6)


def float32_gemm_rate(size: int = GEMM_SIZE, timer: Timer = interleave) -> float:
    """Operations per second of a float32 torch.mm, which is almost all fused multiply-adds."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    timing = timer({"gemm": lambda: torch.mm(a, b)}, PROBE_SECONDS)["gemm"]
    return 2 * size**3 / (timing.best_us * 1e-6)


def call_microseconds(timer: Timer = interleave) -> float:
    """Of the dispatcher, the checks and the allocation: quantize of one element."""
    x, scale = torch.ones(1, 1), torch.ones(1)
    timing = timer({"call": lambda: ops.quantize(x, scale)}, PROBE_SECONDS)["call"]
    return timing.best_us
