"""Times every operator against the machine's roofs: `python -m bench.run`. See bench/README.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import mambaquant_ext
from bench import machine, report
from bench.harness import BenchCase, all_cases, measure
from bench.roofs import Roofs, measure_roofs

SEED = 0


class Preset(str, Enum):
    """Which shapes: see bench/shapes.py."""

    QUICK = "quick"
    FULL = "full"
    CPU = "cpu"


DEFAULT_SECONDS = {Preset.QUICK: 0.4, Preset.FULL: 0.08, Preset.CPU: 0.2}
MINIMUM_ROUNDS = {Preset.QUICK: 7, Preset.FULL: 5, Preset.CPU: 5}

Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Default: the cores this process may use.")
]
IsaName = Annotated[
    str | None, typer.Option("--isa", help="scalar, avx2 or avx512_vnni; default: the best.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Default: in the output folder.")
]
OutputDir = Annotated[
    Path, typer.Option("--output-dir", file_okay=False, help="Where JSON and Markdown go.")
]


def prepare(threads: int | None, isa: str | None) -> dict[str, Any]:
    """Pins the process, picks the instruction set, and describes the machine.

    Raises:
        ValueError: more threads than cores, or an instruction set that this machine lacks.
    """
    if isa is not None:
        mambaquant_ext.force_isa(isa)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pinned = machine.pin(threads or allowed or 1)
    torch.manual_seed(SEED)
    return machine.describe(pinned)


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


def case_numbers(case: BenchCase) -> BenchCase:
    """The case without what it runs."""
    return BenchCase(
        case.op, case.shape, lambda: None, lambda: None, case.bytes_moved, case.operations,
        arithmetic=case.arithmetic, working_set_bytes=case.working_set_bytes,
    )  # fmt: skip


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
    try:
        values = {
            "schema": report.SCHEMA,
            "command": "run",
            "preset": preset.value,
            "seconds": span,
            "machine": prepare(threads, isa),
            **collect(
                all_cases(preset.value, op or ()), span, MINIMUM_ROUNDS[preset],
                progress=show_progress, compiled=preset is Preset.CPU,
            ),
        }  # fmt: skip
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not values["rows"]:
        raise typer.BadParameter(f"no case of {', '.join(op or ())}", param_hint="--op")
    body = [report.cells(row) for row in values["rows"]]
    finish("Operators", values, report.HEADER, body, json or output_dir / "run.json")


def finish(
    title: str, values: dict[str, Any], header: list[str], body: list[list[str]], path: Path
) -> None:
    """Prints the table, writes the JSON file and, beside it, the same table as Markdown."""
    show_progress("")
    for line in report.machine_lines(values):
        print(line)
    report.print_table(title, header, body)
    report.write_json(values, path)
    page = path.with_suffix(".md")
    page.write_text(report.markdown(title, values, header, body), encoding="utf-8")
    print(f"{path}, {page}")


def show_progress(what: str) -> None:
    """One line on stderr that the next one overwrites; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what[:100]}")
        sys.stderr.flush()


if __name__ == "__main__":
    typer.run(run)
