"""Results as plain values for JSON, and as tables for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import gpu_machine
from bench.harness import BenchCase, Timing
from bench.machine import place_of
from bench.roofs import Roofs

SCHEMA = 1
OURS = "ours"
HEADER = [
    "op", "shape", "in", "median us", "quartiles us", "best us", "GB/s", "Gop/s", "roof", "bound",
    "x baseline",
]  # fmt: skip

Row = dict[str, Any]


def timing_values(timings: dict[str, Timing]) -> dict[str, Any]:
    """Timings and, for each baseline, its median over ours: above 1, ours is faster."""
    ours = timings[OURS].median_us
    return {
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_baseline": {
            name: timing.median_us / ours for name, timing in timings.items() if name != OURS
        },
    }


def case_row(
    case: BenchCase,
    timings: dict[str, Timing],
    roofs: Roofs,
    place_of: Callable[[int], str] = place_of,
) -> Row:
    """One line of a result.

    The roof's time is the longer of bytes over copy bandwidth (of the memory that the working set
    fits) and operations over the arithmetic rate. share_of_roof is that time over the median.
    bound says which of the two it is, or "call" where a call that does nothing takes longer still.
    place_of names the memory that a working set fits, one of those in roofs.copy.
    """
    seconds = timings[OURS].median_us * 1e-6
    place = place_of(case.working_set)
    limits = {
        "memory": case.bytes_moved / roofs.copy[place],
        "arithmetic": case.operations / roofs.arithmetic[case.arithmetic],
    }
    nearer = max(limits, key=lambda name: limits[name])
    return {
        "op": case.op,
        "shape": case.shape,
        "bytes_moved": case.bytes_moved,
        "operations": case.operations,
        "arithmetic": case.arithmetic,
        "working_set_bytes": case.working_set,
        "working_set_in": place,
        **timing_values(timings),
        "bytes_per_second": case.bytes_moved / seconds,
        "operations_per_second": case.operations / seconds,
        "share_of_roof": limits[nearer] / seconds,
        "bound": "call" if roofs.call_us * 1e-6 > limits[nearer] else nearer,
    }


def write_json(values: dict[str, Any], path: Path) -> None:
    """One document; every list of rows has one a line, to be readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f" {json.dumps(name)}: {_part(value)}" for name, value in values.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _part(value: Any) -> str:
    """A value of the document."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
        return f"[\n{rows}\n ]"
    return json.dumps(value, indent=1).replace("\n", "\n ")


def read_json(path: Path) -> dict[str, Any]:
    """What write_json wrote.

    Raises:
        ValueError: not a result, or one of another schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected a bench result of schema {SCHEMA}, got {found!r}")
    return values


def cells(row: Row) -> list[str]:
    """A row as text, in the order of HEADER."""
    return [
        row["op"],
        row["shape"],
        row["working_set_in"],
        *timing_cells(row["timings"][OURS]),
        f"{row['bytes_per_second'] / 1e9:.1f}",
        f"{row['operations_per_second'] / 1e9:.1f}",
        f"{row['share_of_roof']:.0%}",
        row["bound"],
        baseline_cell(row),
    ]


def timing_cells(timing: dict[str, float]) -> list[str]:
    """Median, quartiles, best."""
    quartiles = f"{microseconds(timing['lower_us'])} - {microseconds(timing['upper_us'])}"
    return [microseconds(timing["median_us"]), quartiles, microseconds(timing["best_us"])]


def baseline_cell(row: Row) -> str:
    """Every baseline's ratio with its name."""
    ratios = row["times_baseline"].items()
    return ", ".join(f"{ratio:.2f} {name}" for name, ratio in ratios)


def microseconds(value: float) -> str:
    """Three digits or more."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def machine_lines(values: dict[str, Any]) -> list[str]:
    """The machine, and the roofs if there are any, in a few lines."""
    machine = values["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load_average"][0]
    lines = gpu_machine.lines(machine["gpu"]) if "gpu" in machine else []
    lines += [
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads on cores "
        f"{machine['pinned_cores']}; L2 {machine['l2_bytes'] >> 10} KiB a core, "
        f"L3 {machine['l3_bytes'] >> 20} MiB",
        f"{versions}; commit {machine['commit']}; {machine['date']}",
        f"load average at the start {load:.2f} on {machine['cores']} cores"
        + (": other work was running" if machine["is_busy"] else ""),
    ]
    if "roofs" in values:
        roofs = values["roofs"]
        copies = ", ".join(f"{place} {rate / 1e9:.0f}" for place, rate in roofs["copy"].items())
        rates = ", ".join(f"{k} {rate / 1e9:.0f}" for k, rate in roofs["arithmetic"].items())
        read = f"; read (GB/s) {roofs['read'] / 1e9:.0f}" if roofs.get("read") else ""
        lines.append(
            f"roofs: copy (GB/s) {copies}{read}; arithmetic (Gop/s) {rates}; "
            f"empty call {roofs['call_us']:.1f} us"
        )
    return lines


def short_machine(values: dict[str, Any]) -> str:
    """The machine in a title."""
    machine = values["machine"]
    return f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes a table to stdout; piped, it is as wide as it needs."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def markdown(title: str, values: dict[str, Any], header: Sequence[str], body: Any) -> str:
    """The same table for a page."""
    lines = [f"# {title}", "", *(f"- {line}" for line in machine_lines(values)), ""]
    return "\n".join([*lines, *markdown_table(header, body)]) + "\n"


def markdown_table(header: Sequence[str], body: Any, names: int = 2) -> list[str]:
    """The lines of a table; all columns but the first, so many, are figures."""
    aligned = ["---"] * names + ["---:"] * (len(header) - names)
    return [f"| {' | '.join(row)} |" for row in (header, aligned, *body)]


def insert(page: str, begin: str, end: str, text: str) -> str:
    """A page with another text between its two markers.

    Raises:
        ValueError: not one marker each, in this order.
    """
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found or page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected a page with one {begin} and one {end} behind it")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
