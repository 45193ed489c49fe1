"""How near figures of ours come to what the machine gives, measured in turn with them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.cpu.engines import OURS
from bench.cpu.plan import Figure, Samples
from bench.cpu.probes import INT8, READ, REREAD, SCAN
from bench.shapes import LanguageShape


@dataclass(frozen=True)
class Share:
    """How near a figure comes to what the machine's roofs allow.

    Attributes:
        kind: "prefill" or "decode".
        figure: which.
        measured_s: of a call, the median.
        roof_s: of the same call, were nothing slower than the roofs; the median.
        share: roof_s over measured_s, the median of the rounds.
        spread: its quartiles.
        parts: what roof_s is made of, and what stands beside it; medians.
    """

    kind: str
    figure: str
    measured_s: float
    roof_s: float
    share: float
    spread: tuple[float, float]
    parts: dict[str, float]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of a single value, that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4)
    return lower, median, upper


def _share(
    figure: Figure, measured: Sequence[float], roof: Sequence[float], parts: dict[str, float]
) -> Share:
    """Of the rounds that both took: each holds a measurement against the roof of its own moment."""
    lower, share, upper = quartiles([r / m for r, m in zip(roof, measured, strict=False)])
    medians = statistics.median(measured), statistics.median(roof)
    return Share(figure.op, figure.shape, *medians, share, (lower, upper), parts)


def prefill_share(
    figure: Figure,
    shape: LanguageShape,
    measured: Sequence[float],
    int8: Sequence[float],
    scan: Sequence[float],
) -> Share:
    """(GEMM operations at the rate of torch._int_mm + scans at their kernel's own time) / measured time.

    Args:
        figure: of op prefill.
        shape: of its model.
        measured: seconds of a call, round by round.
        int8: seconds per operation of torch._int_mm.
        scan: seconds of the scan's kernel, of one layer and sequence.
    """
    operations = 2 * figure.tokens_in_all * shape.layers * shape.linear_weights
    scans = shape.layers * figure.batch
    roof = [operations * i + scans * s for i, s in zip(int8, scan, strict=False)]
    parts = {
        "gemm_s": operations * statistics.median(int8),
        "scan_s": scans * statistics.median(scan),
    }
    return _share(figure, measured, roof, parts)


def decode_share(
    figure: Figure,
    shape: LanguageShape,
    measured: Sequence[float],
    decoded_bytes: int,
    read: Sequence[float],
    reread: Sequence[float],
) -> Share:
    """What a token must read of the model, at the higher bandwidth of reading / measured time.

    Args:
        figure: of op decode.
        shape: of its model.
        measured: seconds of a call, round by round.
        decoded_bytes: the packed weights of blocks and head, and a row of the embedding.
        read: seconds per byte of memory.
        reread: seconds per byte of decoded_bytes, over and over.
    """
    parts = {
        "decoded_bytes": decoded_bytes,
        "read_bytes_per_s": 1 / statistics.median(read),
        "reread_bytes_per_s": 1 / statistics.median(reread),
        "state_bytes": shape.state_bytes(figure.batch),
    }
    roof = [decoded_bytes * min(once, again) for once, again in zip(read, reread, strict=False)]
    return _share(figure, measured, roof, parts)


def shares(
    samples: Samples,
    probed: Samples,
    shapes: Mapping[str, LanguageShape],
    decoded_bytes: Mapping[str, int],
) -> list[Share]:
    """Of every figure of ours that has been probed.

    Args:
        samples: seconds per call.
        probed: of bench.cpu.probes.
        shapes: by name of the model.
        decoded_bytes: by name of the model.
    """
    found = []
    for figure, probes in probed.items():
        measured = samples.get(figure, {}).get(OURS)
        shape = shapes[figure.size]
        if measured is None:
            continue
        if READ in probes:
            size = decoded_bytes[figure.size]
            found.append(decode_share(figure, shape, measured, size, probes[READ], probes[REREAD]))
        else:
            found.append(prefill_share(figure, shape, measured, probes[INT8], probes[SCAN]))
    return found
