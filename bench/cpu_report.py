"""What a run of bench.cpu has to say: rows of ours and a peer, shares of the machine's roofs, and the bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import report
from bench.cpu_plan import Figure, counted
from bench.cpu_probes import INT8, READ, SCAN
from bench.engines import OURS
from bench.harness import timing_of
from bench.report import Row
from bench.shapes import LanguageShape

HEADER = [
    "figure", "peer", "ours tokens/s", "quartiles", "peer tokens/s", "quartiles", "x peer",
    "quartiles",
]  # fmt: skip
LONG_HEADER = ["prompt", "model", "tokens/s", "peak MiB", "grown by MiB"]
FIRST_HEADER = ["engine", "model", "s", "imports s", "load s", "prompt s"]
SHARE_HEADER = ["share", "figure", "measured", "at the roofs", "share", "beside"]
BAR_HEADER = ["figure", "of", "measured", "bar", "aim", "reached"]
LEFT_OUT = ["engine", "figure", "why"]
Samples = Mapping[Figure, Mapping[str, Sequence[float]]]


def ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """The peer's time over ours of each round that both took: above 1, ours is faster."""
    return [theirs / own for own, theirs in zip(ours, peer, strict=False)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, of two values at least."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return lower, median, upper


def peer_rows(samples: Samples) -> list[Row]:
    """A row for each figure and peer; one with ours alone where there is no peer."""
    rows = []
    for figure, engines in samples.items():
        if OURS not in engines:
            continue
        peers = [name for name in engines if name != OURS]
        rows += [_peer_row(figure, engines[OURS], engines, name) for name in peers or [None]]
    return rows


def _peer_row(
    figure: Figure,
    ours: Sequence[float],
    engines: Mapping[str, Sequence[float]],
    peer: str | None,
) -> Row:
    taken = {OURS: ours} if peer is None else {OURS: ours, peer: engines[peer]}
    rates = {name: spread([figure.tokens_in_all / s for s in v]) for name, v in taken.items()}
    compared = None if peer is None else spread(ratios(ours, engines[peer]))
    timings = {name: asdict(timing_of([s * 1e6 for s in v])) for name, v in taken.items()}
    return {
        "figure": f"{figure.op} {figure.shape}",
        "op": figure.op,
        "shape": figure.shape,
        "size": figure.size,
        "threads": figure.threads,
        "batch": figure.batch,
        "tokens": figure.tokens,
        "peer_name": peer,
        "ours": rates[OURS][1],
        "peer": None if peer is None else rates[peer][1],
        "ratio": None if compared is None else compared[1],
        "unit": "tokens/s",
        "spread": {
            "ours": rates[OURS][::2],
            "peer": None if peer is None else rates[peer][::2],
            "ratio": None if compared is None else compared[::2],
        },
        "timings": timings,
    }


def cells(row: Row) -> list[str]:
    """A row as text, in the order of HEADER."""
    spreads = row["spread"]
    pairs = [
        (row["ours"], spreads["ours"], "{:,.0f}"),
        (row["peer"], spreads["peer"], "{:,.0f}"),
        (row["ratio"], spreads["ratio"], "{:.2f}"),
    ]
    texts = []
    for value, quartiles, style in pairs:
        texts.append("" if value is None else style.format(value))
        texts.append("" if value is None else " - ".join(style.format(q) for q in quartiles))
    return [row["figure"], row["peer_name"] or "", *texts]


@dataclass(frozen=True)
class Share:
    """How near a figure comes to what the machine's roofs allow.

    Attributes:
        kind: "prefill" or "decode".
        figure: which.
        measured_s: of a call, the median.
        roof_s: of the same call, were nothing slower than the roofs; the median.
        share: roof_s over measured_s, the median of the rounds.
        beside: what roof_s is made of, and leaves out, in words.
    """

    kind: str
    figure: str
    measured_s: float
    roof_s: float
    share: float
    beside: str


def _share(figure: Figure, measured: Sequence[float], roof: Sequence[float], beside: str) -> Share:
    """Of the rounds that both took."""
    share = statistics.median(r / m for r, m in zip(roof, measured, strict=False))
    medians = statistics.median(measured), statistics.median(roof)
    return Share(figure.op, figure.shape, *medians, share, beside)


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
    gemm_ms = operations * statistics.median(int8) * 1e3
    scan_ms = scans * statistics.median(scan) * 1e3
    return _share(figure, measured, roof, f"GEMM {gemm_ms:.1f} ms, scan {scan_ms:.1f} ms")


def decode_share(
    figure: Figure,
    shape: LanguageShape,
    measured: Sequence[float],
    weight_bytes: int,
    read: Sequence[float],
) -> Share:
    """Weights that a token must read, at the bandwidth of reading memory / measured time.

    Args:
        figure: of op decode.
        shape: of its model.
        measured: seconds of a call, round by round.
        weight_bytes: of the quantized model without its embedding table.
        read: seconds per byte.
    """
    states = shape.state_bytes(figure.batch)
    rate = 1e-9 / statistics.median(read)
    beside = (
        f"weights {weight_bytes / 1e6:.1f} MB at {rate:.1f} GB/s; "
        f"not counted: state {states / 1e6:.1f} MB"
    )
    return _share(figure, measured, [weight_bytes * r for r in read], beside)


def shares(
    samples: Samples,
    probed: Samples,
    shapes: Mapping[str, LanguageShape],
    weight_bytes: Mapping[str, int],
) -> list[Share]:
    """Of every figure of ours that has been probed.

    Args:
        samples: seconds per call.
        probed: of bench.cpu_probes.
        shapes: by name of the model.
        weight_bytes: by name of the model.
    """
    found = []
    for figure, probes in probed.items():
        measured = samples.get(figure, {}).get(OURS)
        shape = shapes[figure.size]
        if measured is None:
            continue
        if READ in probes:
            weights = weight_bytes[figure.size]
            found.append(decode_share(figure, shape, measured, weights, probes[READ]))
        else:
            found.append(prefill_share(figure, shape, measured, probes[INT8], probes[SCAN]))
    return found


def share_cells(row: Row) -> list[str]:
    """In the order of SHARE_HEADER."""
    return [
        row["kind"], row["figure"], f"{row['measured_s'] * 1e3:.2f} ms",
        f"{row['roof_s'] * 1e3:.2f} ms", f"{row['share']:.2f}", row["beside"],
    ]  # fmt: skip


def long_cells(row: Row) -> list[str]:
    """In the order of LONG_HEADER."""
    return [
        f"{row['tokens']:,}", f"{row['size']}, {counted(row['threads'], 'thread')}",
        f"{row['tokens'] / row['seconds']:,.0f}",
        f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['grown_bytes'] / 2**20:,.1f}",
    ]  # fmt: skip


def first_cells(row: Row) -> list[str]:
    """In the order of FIRST_HEADER."""
    parts = [row[name] for name in ("seconds", "import_s", "load_s", "prompt_s")]
    what = ", ".join([
        row["size"], counted(row["threads"], "thread"), counted(row["tokens"], "token"),
    ])  # fmt: skip
    return [row["engine"], what, *(f"{part:.2f}" for part in parts)]


def bar_cells(row: Row) -> list[str]:
    """In the order of BAR_HEADER."""
    words = {True: "yes", False: "no", None: "not measured"}
    return [
        row["figure"], row["detail"], "" if row["measured"] is None else f"{row['measured']:.2f}",
        f"{row['least']:g}", "" if row["aim"] is None else f"{row['aim']:g}",
        words[row["reached"]],
    ]  # fmt: skip


def tables(values: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and body of each table that has rows; the bars last."""
    wanted: list[tuple[str, list[str], str, Callable[[Row], list[str]]]] = [
        ("Kernels", report.HEADER, "kernels", report.cells),
        ("Kernels, AVX2 forced", report.HEADER, "kernels_avx2", report.cells),
        ("Whole models", HEADER, "rows", cells),
        ("Prompts by length", LONG_HEADER, "long_prompts", long_cells),
        ("First token, from a process's start", FIRST_HEADER, "first_tokens", first_cells),
        ("Left out", LEFT_OUT, "left_out", lambda row: [row[name] for name in LEFT_OUT]),
        ("Shares of the roofs", SHARE_HEADER, "shares", share_cells),
        ("Bars", BAR_HEADER, "bars", bar_cells),
    ]
    return [
        (title, header, [to_cells(row) for row in values[key]])
        for title, header, key, to_cells in wanted
        if values.get(key)
    ]


def page(values: dict[str, Any], found: Sequence[tuple[str, list[str], list[list[str]]]]) -> str:
    """The tables as Markdown, the bars first, for people who read no further."""
    lines = [f"# Language models on a CPU, {values['preset']}", ""]
    lines += [f"- {line}" for line in report.machine_lines(values)]
    lines += [f"- {name}: {settings}" for name, settings in values["engines"].items()]
    for title, header, body in reversed(found):
        lines += ["", f"## {title}", "", *report.markdown_table(header, body)]
    return "\n".join(lines) + "\n"
