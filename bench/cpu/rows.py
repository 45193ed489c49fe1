"""The rows of a result: ours beside one peer, whatever was timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.cpu.engines import OURS
from bench.cpu.engines.engine import MAPPED, WAYS
from bench.cpu.first_token import TOKENS
from bench.cpu.plan import Figure, Samples, counted
from bench.cpu.shares import quartiles
from bench.harness import timing_of
from bench.report import Row

TOKENS_PER_SECOND, SECONDS, MICROSECONDS = "tokens/s", "s", "us"


def ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """The peer's time over ours of each round that both took: above 1, ours is faster."""
    return [theirs / own for own, theirs in zip(ours, peer, strict=False)]


def _row(
    names: tuple[str, str, str | None],
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float] | None,
    ratio: Sequence[float] | None,
    **more: Any,
) -> Row:
    """What every row has. Figures are lower quartile, median, upper quartile, or None where there is no peer.

    Args:
        names: op, shape, and the peer's.
        unit: of ours and peer.
        ours: measured.
        peer: measured.
        ratio: above 1, ours is better; its quartiles may be unknown.
        more: what rows of a kind have besides.
    """
    op, shape, peer_name = names
    found = {"ours": ours, "peer": peer, "ratio": ratio}
    return {
        "figure": f"{op} {shape}",
        "op": op,
        "shape": shape,
        "peer_name": peer_name,
        **{name: None if values is None else values[1] for name, values in found.items()},
        "unit": unit,
        "spread": {
            name: None if values is None else [values[0], values[2]]
            for name, values in found.items()
        },
        **more,
    }


def model_rows(samples: Samples) -> list[Row]:
    """Tokens per second: a row for each figure and peer, one with ours alone where there is no peer."""
    found = []
    for figure, engines in samples.items():
        if OURS in engines:
            peers: list[str | None] = [name for name in engines if name != OURS]
            found += [_model_row(figure, engines, name) for name in peers or [None]]
    return found


def _model_row(figure: Figure, engines: Mapping[str, Sequence[float]], peer: str | None) -> Row:
    taken = {OURS: engines[OURS]} if peer is None else {n: engines[n] for n in (OURS, peer)}
    rates = {name: quartiles([figure.tokens_in_all / s for s in v]) for name, v in taken.items()}
    return _row(
        (figure.op, figure.shape, peer),
        TOKENS_PER_SECOND,
        rates[OURS],
        None if peer is None else rates[peer],
        None if peer is None else quartiles(ratios(engines[OURS], engines[peer])),
        size=figure.size,
        threads=figure.threads,
        batch=figure.batch,
        tokens=figure.tokens,
        timings={name: asdict(timing_of([s * 1e6 for s in v])) for name, v in taken.items()},
    )


def start_rows(first_tokens: Sequence[Row]) -> list[Row]:
    """Seconds from a process's start to a prompt's logits: our quickest way beside every engine and our other way.

    Args:
        first_tokens: of bench.cpu.session.
    """
    found = []
    for ours in (row for row in first_tokens if row["engine"] == MAPPED):
        shape = f"{ours['size']}, {counted(ours['threads'], 'thread')}, {counted(TOKENS, 'token')}"
        own = [start["seconds"] for start in ours["starts"]]
        for row in first_tokens:
            if row["size"] == ours["size"] and row is not ours:
                theirs = [start["seconds"] for start in row["starts"]]
                name = f"ours, {row['engine']}" if row["engine"] in WAYS else row["engine"]
                ratio = quartiles(ratios(own, theirs))
                names = ("start", shape, name)
                timings = {OURS: asdict(timing_of([s * 1e6 for s in own]))}
                found.append(
                    _row(names, SECONDS, quartiles(own), quartiles(theirs), ratio, timings=timings)
                )
    return found


def kernel_rows(kernels: Sequence[Row], isa: str | None = None) -> list[Row]:
    """Microseconds of a kernel's call beside each of its baselines, timed in turn.

    Args:
        kernels: of bench.run.
        isa: forced; None for the best.
    """
    found = []
    for kernel in kernels:
        shape = kernel["shape"] if isa is None else f"{kernel['shape']}, {isa}"
        own = _of_timing(kernel["timings"][OURS])
        for name, ratio in kernel["times_baseline"].items():
            peer = _of_timing(kernel["timings"][name])
            timings = {OURS: kernel["timings"][OURS]}
            names = (kernel["op"], shape, name)
            row = _row(names, MICROSECONDS, own, peer, (ratio, ratio, ratio), timings=timings)
            row["spread"]["ratio"] = None  # of medians
            found.append(row)
    return found


def _of_timing(timing: Mapping[str, float]) -> tuple[float, float, float]:
    return timing["lower_us"], timing["median_us"], timing["upper_us"]
