"""Times our ways from disk to the first token: `python -m bench.load`. See bench/README.md."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import machine, report
from bench.command import (
    IsaName,
    JsonFile,
    OutputDir,
    Threads,
    finish,
    prepare,
    result,
    show_progress,
)  # fmt: skip
from bench.cpu.engines import WAYS
from bench.cpu.engines.engine import PREPACKED, W8A8
from bench.cpu.first_token import TOKENS, drop_from_cache, first_token
from bench.cpu.models.files import ModelError, folder_of, make_missing, write_prepacked
from bench.shapes import LANGUAGE_MODELS, M130

CACHES = ("warm", "cold")
HEADER = [
    "way", "page cache", "imports ms", "load ms", "first token ms", "from disk ms", "process ms", "own MiB",
    "mapped MiB", "peak MiB",
]  # fmt: skip


def rows_of(folder: Path, rounds: int, threads: int) -> list[report.Row]:
    """The quickest of some rounds of each way, warm and cold, all in turn.

    Args:
        folder: with the model as W8A8 and as PREPACKED.
        rounds: one process each.
        threads: to compute with.
    """
    best: dict[tuple[str, str], dict[str, float]] = {}
    os.sync()  # only pages that are written can be dropped
    for round_, way, cache in itertools.product(range(rounds), WAYS, CACHES):
        show_progress(f"{way}, {cache}, round {round_ + 1}")
        if cache == "cold":
            drop_from_cache(folder / WAYS[way].file)
        values = first_token(way, folder, threads, machine.allowed_cores())
        so_far = best.get((way, cache), values)
        best[way, cache] = min(so_far, values, key=from_disk_s)
    return [{"op": way, "shape": cache, **values} for (way, cache), values in best.items()]


def from_disk_s(values: dict[str, float]) -> float:
    """What depends on the model: all but the imports."""
    return values["load_s"] + values["prompt_s"]


def cells(row: report.Row) -> list[str]:
    """A row as text, in the order of HEADER."""
    seconds = (*(row[f"{name}_s"] for name in ("import", "load", "prompt")), from_disk_s(row))
    sizes = (row[f"{name}_bytes"] / 2**20 for name in ("own", "mapped", "peak"))
    times = (second * 1e3 for second in (*seconds, row["seconds"]))
    return [row["op"], row["shape"], *(f"{value:,.0f}" for value in (*times, *sizes))]


def run(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Quantized; default: random weights."),
    ] = None,
    size: Annotated[str, typer.Option(help="Of random weights: mamba-130m ...")] = M130.name,
    rounds: Annotated[int, typer.Option(min=1, help="Processes a row; the best counts.")] = 5,
    isa: IsaName = None,
    threads: Threads = None,
    json: JsonFile = None,
    output_dir: OutputDir = Path("bench-output"),
) -> None:
    """Time loading and the first token, with weights packed at load and mapped from a packed image."""
    if size not in LANGUAGE_MODELS:
        raise typer.BadParameter(
            f"--size: expected one of {', '.join(LANGUAGE_MODELS)}, got {size}"
        )
    described = prepare(threads, isa)
    if isa is not None:
        os.environ["MAMBAQUANT_CPU_ISA"] = isa  # of the processes
    used = torch.get_num_threads()
    if model is not None:
        with tempfile.TemporaryDirectory(prefix="load") as name:
            shutil.copytree(model, Path(name) / W8A8)
            write_prepacked(Path(name) / W8A8, Path(name) / PREPACKED)
            rows = rows_of(Path(name), rounds, used)
    else:
        shape = LANGUAGE_MODELS[size]
        folder = folder_of(shape, output_dir / "models")
        show_progress(f"making {size}")
        try:
            make_missing(folder, shape, {W8A8, PREPACKED})
        except ModelError as error:
            raise typer.BadParameter(str(error)) from None
        rows = rows_of(folder, rounds, used)
    named = f"{size}, random weights" if model is None else model.name
    values = result("load", described, model=named, prompt=TOKENS, rounds=rounds, rows=rows)
    body = [cells(row) for row in rows]
    finish("From disk to the first token", values, HEADER, body, json or output_dir / "load.json")


if __name__ == "__main__":
    typer.run(run)
