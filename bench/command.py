"""What commands share: options, how they prepare the process, and how they hand over results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import mambaquant_ext
from bench import machine, report

SEED = 0
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
        typer.BadParameter: more threads than cores, or an instruction set that this machine lacks.
    """
    allowed = len(machine.allowed_cores()) or os.cpu_count() or 1
    try:
        if isa is not None:
            mambaquant_ext.force_isa(isa)
        pinned = machine.pin(threads or allowed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    torch.manual_seed(SEED)
    return machine.describe(pinned)


def result(command: str, described: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A document for JSON, which says what made it, and where.

    Args:
        command: name of the module.
        described: from prepare.
        values: of the command.
    """
    return {"schema": report.SCHEMA, "command": command, "machine": described, **values}


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
