"""Writes the tables of README.md that come from bench/results: of the demo, and of speed on a CPU.

Usage: python -m scripts.gen_readme
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
NAMES = {
    "float32": "float32 (transformers)",
    "RTN": "round to nearest",
    "MambaQuant": "**MambaQuant**",
}
THREADS = 2
# Op, batch and tokens of a column, and its name.
COLUMNS = {
    ("prefill", 1, 512): "prompt of 512",
    ("decode", 1, 1): "decode",
    ("decode", 8, 1): "decode, batch 8",
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with a name and figures in each row."""
    return "\n".join(report.markdown_table(header, rows, names=1))


def demo_table(result: Mapping[str, Any]) -> str:
    """Accuracy, size and speed of the demo's models."""
    plain = result["rows"][0]["perplexity"]
    rows = [
        [
            NAMES.get(row["model"], row["model"]),
            f"{row['perplexity']:.3f}",
            f"{100 * (row['perplexity'] / plain - 1):+.2f} %",
            f"{row['size_bytes'] / 1e6:.2f}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "model", "perplexity", "loss", "MB on disk", "prompt tok/s", "decode tok/s",
    ]  # fmt: skip
    return f"{markdown(header, rows)}\n\nOn {report.short_machine(dict(result))}."


def cpu_table(result: Mapping[str, Any]) -> str:
    """Tokens a second of every engine, and how near ours comes to the machine, for the result's smallest model."""
    size = next(row["size"] for row in result["rows"] if row.get("size"))
    found = {
        (row["peer_name"], (row["op"], row["batch"], row["tokens"])): row
        for row in result["rows"]
        if row.get("size") == size and row["threads"] == THREADS
    }
    peers = list(dict.fromkeys(peer for peer, _ in found if peer is not None))

    def cell(peer: str, column: tuple[str, int, int]) -> str:
        row = found.get((peer, column))
        return f"{row['peer']:,.0f} ({row['ratio']:.1f}x)" if row else "left out"

    ours = {column: row["ours"] for (_, column), row in found.items()}
    rows = [["**ours, W8A8**", *(f"**{ours[column]:,.0f}**" for column in COLUMNS)]]
    rows += [[peer, *(cell(peer, column) for column in COLUMNS)] for peer in peers]
    header = [f"{size}, tokens a second", *COLUMNS.values()]
    prefill, decode = (
        next(
            share["share"]
            for share in result["shares"]
            if share["kind"] == kind and share["figure"] == f"{size}, {THREADS} threads, {rest}"
        )
        for kind, rest in (("prefill", "batch 1, 512 tokens"), ("decode", "batch 1"))
    )
    return (
        f"{markdown(header, rows)}\n\nOn {report.short_machine(dict(result))}. Of what this machine gives: the prompt "
        f"{prefill:.2f}, decoding {decode:.2f} (GEMMs at torch's rate and the scan alone; the bandwidth of reading)."
    )


def page(text: str) -> str:
    """README.md with the tables of the committed results."""
    tables = {"demo": demo_table, "cpu": cpu_table, "cpu-370m": cpu_table, "cpu-1.4b": cpu_table}
    for name, table in tables.items():
        file = f"bench/results/{name}.json"
        body = table(report.read_json(ROOT / file))
        text = report.insert(text, f"<!-- {file} -->", f"<!-- end of {file} -->", body)
    return text


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
