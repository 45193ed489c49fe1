"""Draws a result of bench.run or bench.cpu: `python -m bench.plot run.json run.png`. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bench import report
from bench.cpu import picture

COLOURS = {"memory": "#3b75af", "arithmetic": "#c44e52", "call": "#999999"}


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

    figure = (picture.models if values["command"] == "cpu" else _shares)(values)
    figure.suptitle(report.short_machine(values), fontsize=10)
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
    return figure


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
