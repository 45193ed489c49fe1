"""Times every operator against the machine's roofs: `python -m bench.run`. See bench/README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import report
from bench.command import (
    IsaName,
    JsonFile,
    OutputDir,
    Threads,
    finish,
    prepare,
    result,
    show_progress,
)
from bench.harness import BenchCase, all_cases, case_numbers, measure
from bench.roofs import Roofs, measure_roofs


class Preset(str, Enum):
    """Which shapes: see bench/shapes.py."""

    QUICK = "quick"
    FULL = "full"
    CPU = "cpu"


DEFAULT_SECONDS = {Preset.QUICK: 0.4, Preset.FULL: 0.08, Preset.CPU: 0.2}
MINIMUM_ROUNDS = {Preset.QUICK: 7, Preset.FULL: 5, Preset.CPU: 5}


def collect(
    cases: Iterable[BenchCase],
    seconds: float,
    minimum_rounds: int = 7,
    probe: Callable[[], Roofs] = measure_roofs,
    progress: Callable[[str], None] = lambda _what: None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Roofs and rows. The roofs are probed before and after the cases; the better counts.

    Args:
        cases: to check and time.
        seconds: of sampling per callable.
        minimum_rounds: samples per callable at least.
        probe: measures the roofs.
        progress: called with each case's name before it runs.
        compiled: time torch.compile too, which compiles for seconds a case.

    Returns:
        {"roofs": ..., "rows": [...]}, ready for JSON.

    Raises:
        AssertionError: a kernel is wrong; names the case.
    """
    roofs = probe()
    measured = []
    for case in cases:
        progress(f"{case.op} {case.shape}")
        try:
            timings = measure(case, seconds, minimum_rounds, compiled=compiled)
        except AssertionError as error:
            raise AssertionError(f"{case.op} {case.shape}: wrong result: {error}") from error
        # Only the numbers are kept: a case holds its tensors.
        measured.append((case_numbers(case), timings))
    roofs = roofs.best(probe())
    return {
        "roofs": roofs.to_dict(),
        "rows": [report.case_row(case, timings, roofs) for case, timings in measured],
    }


def run(
    preset: Annotated[
        Preset,
        typer.Option(
            help="Shapes: quick, about a minute; full, many; cpu, of bench.cpu, with torch.compile."
        ),
    ] = (Preset.QUICK),
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Operator or group (gemm); may be repeated.")
    ] = None,
    isa: IsaName = None,
    threads: Threads = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Of sampling, per row and callable.")
    ] = None,
    json: JsonFile = None,
    output_dir: OutputDir = Path("bench-output"),
) -> None:
    """Check every operator, time it beside its baselines, and hold it against the roofs."""
    span = seconds or DEFAULT_SECONDS[preset]
    described = prepare(threads, isa)
    try:
        measured = collect(
            all_cases(preset.value, op or ()), span, MINIMUM_ROUNDS[preset],
            progress=show_progress, compiled=preset is Preset.CPU,
        )  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    values = result("run", described, preset=preset.value, seconds=span, **measured)
    if not values["rows"]:
        raise typer.BadParameter(f"no case of {', '.join(op or ())}", param_hint="--op")
    body = [report.cells(row) for row in values["rows"]]
    finish("Operators", values, report.HEADER, body, json or output_dir / "run.json")


if __name__ == "__main__":
    typer.run(run)
