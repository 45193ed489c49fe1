"""A result of bench.cpu as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench import report
from bench.cpu.first_token import PARTS, TOKENS
from bench.cpu.plan import counted
from bench.cpu.rows import TOKENS_PER_SECOND
from bench.report import Row

HEADER = [
    "figure", "peer", "ours tokens/s", "quartiles", "peer tokens/s", "quartiles", "x peer",
    "quartiles",
]  # fmt: skip
LONG_HEADER = ["prompt", "model", "tokens/s", "peak MiB", "grown by MiB"]
FIRST_HEADER = [
    "engine", "model", "median s", "best s", "imports s", "load s", "prompt s", "own MiB", "mapped MiB",
    "peak MiB",
]  # fmt: skip
SHARE_HEADER = ["kind", "figure", "measured", "at the roofs", "share", "quartiles", "beside"]
BAR_HEADER = ["figure", "of", "measured", "bar", "aim", "reached"]
LEFT_OUT = ["engine", "figure", "why"]


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


def share_cells(row: Row) -> list[str]:
    """In the order of SHARE_HEADER."""
    return [
        row["kind"], row["figure"], f"{row['measured_s'] * 1e3:.2f} ms",
        f"{row['roof_s'] * 1e3:.2f} ms", f"{row['share']:.2f}",
        " - ".join(f"{share:.2f}" for share in row["spread"]), beside(row["parts"]),
    ]  # fmt: skip


def beside(parts: dict[str, float]) -> str:
    """What a share is made of, in words."""
    if "gemm_s" in parts:
        return f"GEMM {parts['gemm_s'] * 1e3:.1f} ms, scan {parts['scan_s'] * 1e3:.1f} ms"
    return (
        f"{parts['decoded_bytes'] / 1e6:.1f} MB; read at {parts['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"again and again at {parts['reread_bytes_per_s'] / 1e9:.1f}; "
        f"not counted: state {parts['state_bytes'] / 1e6:.1f} MB"
    )


def long_cells(row: Row) -> list[str]:
    """In the order of LONG_HEADER."""
    return [
        f"{row['tokens']:,}", f"{row['size']}, {counted(row['threads'], 'thread')}",
        f"{row['tokens'] / row['seconds']:,.0f}",
        f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['grown_bytes'] / 2**20:,.1f}",
    ]  # fmt: skip


def first_cells(row: Row) -> list[str]:
    """In the order of FIRST_HEADER: the median, and the quickest start with its parts and its memory."""
    starts = row["starts"]
    best = min(starts, key=lambda start: start["seconds"])
    what = ", ".join([row["size"], counted(row["threads"], "thread"), counted(TOKENS, "token")])
    times = [statistics.median(start["seconds"] for start in starts), best["seconds"]]
    sizes = [best[f"{name}_bytes"] / 2**20 for name in ("own", "mapped", "peak")]
    return [
        row["engine"], what, *(f"{t:.2f}" for t in (*times, *(best[part] for part in PARTS))),
        *(f"{size:,.0f}" for size in sizes),
    ]  # fmt: skip


def bar_cells(row: Row) -> list[str]:
    """In the order of BAR_HEADER."""
    words = {True: "yes", False: "no", None: "not measured"}
    return [
        row["figure"], row["detail"], "" if row["measured"] is None else f"{row['measured']:.2f}",
        f"{row['least']:g}", "" if row["aim"] is None else f"{row['aim']:g}",
        words[row["reached"]],
    ]  # fmt: skip


Table = tuple[str, list[str], list[list[str]]]


def tables(values: dict[str, Any]) -> list[Table]:
    """Title, header and body of each table that has rows; the bars last."""
    models = [row for row in values["rows"] if row["unit"] == TOKENS_PER_SECOND]
    wanted: list[tuple[str, list[str], Sequence[Row], Callable[[Row], list[str]]]] = [
        ("Kernels", report.HEADER, values["kernels"], report.cells),
        ("Kernels, AVX2 forced", report.HEADER, values["kernels_avx2"], report.cells),
        ("Whole models", HEADER, models, cells),
        ("Prompts by length", LONG_HEADER, values["long_prompts"], long_cells),
        ("First token, from a process's start", FIRST_HEADER, values["first_tokens"], first_cells),
        ("Left out", LEFT_OUT, values["left_out"], lambda row: [row[name] for name in LEFT_OUT]),
        ("Shares of the roofs", SHARE_HEADER, values["shares"], share_cells),
        ("Bars", BAR_HEADER, values["bars"], bar_cells),
    ]
    return [
        (title, header, [to_cells(row) for row in rows])
        for title, header, rows, to_cells in wanted
        if rows
    ]


def page(values: dict[str, Any], found: Sequence[Table]) -> str:
    """The tables as Markdown, the bars first, for people who read no further."""
    lines = [f"# Language models on a CPU, {values['preset']}", ""]
    lines += [f"- {line}" for line in report.machine_lines(values)]
    lines += [f"- {name}: {settings}" for name, settings in values["engines"].items()]
    for title, header, body in reversed(found):
        lines += ["", f"## {title}", "", *report.markdown_table(header, body)]
    return "\n".join(lines) + "\n"
