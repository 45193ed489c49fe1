"""The bars that the figures of mamba-130m on two threads are held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.cpu.engines import OURS
from bench.cpu.plan import Figure, Samples
from bench.cpu.probes import SCAN_READOUT
from bench.cpu.rows import ratios
from bench.cpu.shares import Share
from bench.report import Row

SIZE, THREADS = "mamba-130m", 2
PEER = "llama.cpp Q8_0"
SCAN_TOKENS = 512
LEAST_GEMM_TOKENS = 64
INT_MM = "torch._int_mm, no epilogue"
# What the scan may be compared with: what torch gives on a CPU, its own loops and mambapy's.
SCAN_PEERS = ("torch eager", "torch.compile", "mambapy")


@dataclass(frozen=True)
class Bar:
    """A figure, and what it should reach.

    Attributes:
        figure: what is measured.
        detail: of which rows.
        measured: None where the run lacks a row.
        least: to be reached.
        aim: hoped for, if more than that.
    """

    figure: str
    detail: str
    measured: float | None
    least: float
    aim: float | None = None

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.measured is None else self.measured >= self.least


def bars(samples: Samples, shares: Sequence[Share], kernels: Sequence[Row]) -> list[Bar]:
    """Every bar, measured or not.

    Args:
        samples: seconds per call.
        shares: of bench.cpu.shares.
        kernels: rows of bench.run on THREADS threads.
    """
    prefill = {tokens: Figure("prefill", SIZE, THREADS, 1, tokens) for tokens in (512, 8192)}
    decode = {batch: Figure("decode", SIZE, THREADS, batch, 1) for batch in (1, 8)}
    gemm, scan = _gemm(kernels), _scan(kernels)
    return [
        Bar("prefill over llama.cpp", f"512 tokens, {PEER}", _over(samples, prefill[512]), 6, 8),
        Bar("prefill, share of GEMM and scan", "512 tokens", _share(shares, prefill[512]), 0.75),
        Bar("decode, share of read bandwidth", "batch 1", _share(shares, decode[1]), 0.85),
        Bar("decode over llama.cpp", f"batch 1, {PEER}", _over(samples, decode[1]), 1.4, 1.6),
        Bar(
            "decode, tokens/s of batch 8 over 1", "", _faster(samples, decode[8], decode[1]), 4
        ),
        Bar(
            "prefill, tokens/s of 8,192 over 512", "",
            _faster(samples, prefill[8192], prefill[512]), 0.95,
        ),
        Bar("int8 GEMM with epilogue over torch._int_mm", gemm[0], gemm[1], 1.0),
        Bar("selective scan over the best of torch", scan[0], scan[1], 10),
    ]  # fmt: skip


def _over(samples: Samples, figure: Figure) -> float | None:
    """The peer's time over ours, the median of the rounds."""
    engines: Mapping[str, Sequence[float]] = samples.get(figure, {})
    if OURS not in engines or PEER not in engines:
        return None
    return statistics.median(ratios(engines[OURS], engines[PEER]))


def _share(shares: Sequence[Share], figure: Figure) -> float | None:
    found = (s.share for s in shares if (s.kind, s.figure) == (figure.op, figure.shape))
    return next(found, None)


def _faster(samples: Samples, figure: Figure, base: Figure) -> float | None:
    """Tokens per second of a figure over those of another, the median of the rounds."""
    taken = [samples.get(f, {}).get(OURS) for f in (figure, base)]
    if taken[0] is None or taken[1] is None:
        return None
    rounds = ratios(taken[0], taken[1])
    return statistics.median(rounds) * figure.tokens_in_all / base.tokens_in_all


def _gemm(kernels: Sequence[Row]) -> tuple[str, float | None]:
    """The least favourable product of LEAST_GEMM_TOKENS tokens or more: its name and ratio."""
    found = [
        (row["shape"], row["times_baseline"][INT_MM])
        for row in kernels
        if INT_MM in row["times_baseline"] and gemm_tokens(row) >= LEAST_GEMM_TOKENS
    ]
    if not found:
        return "", None
    name, ratio = min(found, key=lambda pair: pair[1])
    above = sum(r >= 1 for _, r in found)
    return f"the worst: {name}; {above} of {len(found)} rows reach it", ratio


def gemm_tokens(row: Row) -> int:
    """M of a GEMM's row, whose shape ends in MxNxK."""
    return int(row["shape"].split()[2].split("x")[0])


def _scan(kernels: Sequence[Row]) -> tuple[str, float | None]:
    """The least of the ratios to what torch gives: the best peer."""
    for row in kernels:
        if row["op"] == "selective_scan" and f" {SCAN_TOKENS}x" in row["shape"]:
            found = {
                name: ratio for name, ratio in row["times_baseline"].items()
                if name.startswith(SCAN_PEERS)
            }  # fmt: skip
            if found and row["shape"].endswith(SCAN_READOUT):
                name = min(found, key=lambda n: found[n])
                return f"{SCAN_TOKENS} tokens, {name}", found[name]
    return f"{SCAN_TOKENS} tokens", None


def values(bar: Bar) -> dict[str, Any]:
    """For JSON."""
    return {**asdict(bar), "reached": bar.reached}
