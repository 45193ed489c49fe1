"""Compares two results: `python -m bench.compare before.json after.json`. Exit 1: something slower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bench import report

Key = tuple[str, str]
# What must agree for two results to be of one machine.
MACHINE_FIELDS = ("cpu", "isa", "threads")


def ratios(before: dict[str, Any], after: dict[str, Any]) -> dict[Key, float]:
    """Time after over time before, of the rows (operator, shape) that both results have.

    Below 1: faster now. Medians of our own callable; the baselines do not count.
    """
    old = _medians(before)
    return {key: time / old[key] for key, time in _medians(after).items() if key in old}


def _medians(values: dict[str, Any]) -> dict[Key, float]:
    return {
        (row["op"], row["shape"]): row["timings"][report.OURS]["median_us"]
        for row in values["rows"]
    }


def slower(found: dict[Key, float], max_loss: float) -> list[Key]:
    """The rows that take more than 1 + max_loss / 100 of their time before."""
    return [key for key, ratio in found.items() if ratio > 1 + max_loss / 100]


def compare(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    max_loss: Annotated[
        float, typer.Option(min=0, help="Percent more time that a row may take.")
    ] = 10.0,
) -> None:
    """Print time after / time before of each row; exit 1 where a row lost more than allowed."""
    try:
        old, new = report.read_json(before), report.read_json(after)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for field in MACHINE_FIELDS:
        was, now = old["machine"][field], new["machine"][field]
        if was != now:
            print(f"warning: {field} differs: {was} before, {now} after")
    found = ratios(old, new)
    if not found:
        raise typer.BadParameter("the two results have no row in common")
    losses = slower(found, max_loss)
    body = [
        [*key, f"{ratio:.3f}", "slower" if key in losses else ""] for key, ratio in found.items()
    ]
    report.print_table("time after / time before", ["op", "shape", "ratio", ""], body)
    alone = len(old["rows"]) + len(new["rows"]) - 2 * len(found)
    if alone:
        print(f"{alone} rows stand in one result only")
    if losses:
        print(f"{len(losses)} of {len(found)} rows are more than {max_loss:g} % slower")
        raise typer.Exit(1)
    print(f"no row of {len(found)} is more than {max_loss:g} % slower")


if __name__ == "__main__":
    typer.run(compare)
