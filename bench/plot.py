"""Draws a result of bench.run or bench.cpu: `python -m bench.plot run.json run.png`. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bench import report

COLOURS = {"memory": "#3b75af", "arithmetic": "#c44e52", "call": "#999999"}
MARKERS = {"int8": "o", "float32": "^"}
COMPARED = ("prefill", "decode")


def draw(values: dict[str, Any], path: Path) -> None:
    """A result of bench.run as the share of the roof of each row; one of bench.cpu as a roofline and bars.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a result without roofs.
    """
    if "roofs" not in values:
        raise ValueError("expected a result of bench.run or bench.cpu, which has roofs")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mambaquant_ext[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = _models(values) if values["command"] == "cpu" else _shares(values)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _shares(values: dict[str, Any]) -> Any:
    """One bar a row: share of the roof, coloured by which bound is nearer."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = values["rows"]
    figure, axis = pyplot.subplots(figsize=(11, 1.2 + 0.22 * len(rows)))
    shares = [100 * row["share_of_roof"] for row in rows]
    axis.barh(range(len(rows)), shares, color=[COLOURS[row["bound"]] for row in rows])
    axis.set_yticks(range(len(rows)), [f"{row['op']}  {row['shape']}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("share of the roof, %")
    axis.axvline(100, color="black", linewidth=0.8)
    axis.grid(True, axis="x", alpha=0.25)
    axis.legend(
        handles=[Patch(color=c, label=f"bound: {b}") for b, c in COLOURS.items()], fontsize=8
    )
    axis.set_title(_machine(values), fontsize=9)
    return figure


def _machine(values: dict[str, Any]) -> str:
    machine = values["machine"]
    return f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads"


def _models(values: dict[str, Any]) -> Any:
    """The kernels under their roofs, and tokens per second of every engine, a panel each figure."""
    from matplotlib import pyplot

    compared = [rates for op in COMPARED if (rates := compared_engines(values["rows"], op))]
    panels = len(compared) + bool(values["kernels"])
    figure, axes = pyplot.subplots(panels, 1, figsize=(10, 4.2 * panels), squeeze=False)
    remaining = list(axes[:, 0])
    if values["kernels"]:
        _roofline(remaining.pop(0), values)
    for axis, (title, rates) in zip(remaining, compared, strict=True):
        bars = axis.barh(list(rates), list(rates.values()), color=COLOURS["memory"])
        axis.bar_label(bars, fmt=" {:,.0f}", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s")
        axis.set_title(title, fontsize=9)
        axis.grid(True, axis="x", alpha=0.25)
    figure.suptitle(_machine(values), fontsize=10)
    return figure


def compared_engines(rows: list[report.Row], op: str) -> tuple[str, dict[str, float]] | None:
    """Tokens per second by engine, of the first model on the threads that it was first measured with.

    Args:
        rows: of bench.cpu_report.
        op: "prefill" or "decode".

    Returns:
        The name of the figure that most engines have, of those the longest, of one sequence; and the rates.
    """
    found: dict[str, dict[str, float]] = {}
    tokens = {}
    for row in rows:
        if (row["op"], row["batch"]) == (op, 1) and all(
            row[key] == rows[0][key] for key in ("size", "threads")
        ):
            rates = found.setdefault(row["figure"], {report.OURS: row["ours"]})
            tokens[row["figure"]] = row["tokens"]
            if row["peer_name"] is not None:
                rates[row["peer_name"]] = row["peer"]
    if not found:
        return None
    name = max(found, key=lambda n: (len(found[n]), tokens[n]))
    return name, found[name]


def _roofline(axis: Any, values: dict[str, Any]) -> None:
    """Operations per second over operations per byte, both axes logarithmic."""
    rows, roofs = values["kernels"], values["roofs"]
    points = [row["operations"] / row["bytes_moved"] for row in rows]
    span = (min(points) / 2, max(points) * 2)
    for place, rate in roofs["copy"].items():
        ridge = max(roofs["arithmetic"].values()) / rate
        ends = (span[0], min(span[1], ridge))
        axis.plot(ends, [rate * x / 1e9 for x in ends], linewidth=1, label=f"copy, {place}")
    for kind, rate in roofs["arithmetic"].items():
        axis.axhline(rate / 1e9, linewidth=1, color="black", linestyle=_dashes(kind), label=kind)
    for kind, marker in MARKERS.items():
        chosen = [
            (x, row) for x, row in zip(points, rows, strict=True) if row["arithmetic"] == kind
        ]
        axis.scatter(
            [x for x, _ in chosen],
            [row["operations_per_second"] / 1e9 for _, row in chosen],
            marker=marker, s=18, label=f"kernels, {kind}",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("Gop/s")
    axis.set_title("Kernels under the roofs of the same run", fontsize=9)
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=7)


def _dashes(kind: str) -> str:
    return "-" if kind == "int8" else "--"


def plot(
    result: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    image: Annotated[Path, typer.Argument(dir_okay=False, help="PNG file to write.")],
) -> None:
    """Draw a result."""
    try:
        draw(report.read_json(result), image)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(plot)
