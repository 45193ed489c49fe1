"""Times a model from disk to its first token: `python -m bench.load`. See bench/README.md."""

from __future__ import annotations

import copy
import itertools
import json as json_module
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import report
from bench.first_token import PROMPT
from bench.model import CALIBRATION, random_model, random_tokens
from bench.run import IsaName, JsonFile, OutputDir, Threads, finish, prepare, show_progress
from bench.shapes import M130
from mambaquant_ext import prepack, quantize_, recipe, save
from mambaquant_ext.artifacts.packed_image import IMAGE_GLOB

# How the model comes into memory: the call, whether weights are mapped from a packed image, and `verify`.
WAYS = {
    "load, packing": ("load", False, None),
    "load, packing, unverified": ("load", False, False),
    "load, mapped": ("load", True, None),
    "load, mapped, verified": ("load", True, True),
    "load_runner, packing": ("load_runner", False, None),
    "load_runner, mapped": ("load_runner", True, None),
}
CACHES = ("warm", "cold")
HEADER = [
    "way", "page cache", "imports ms", "load ms", "first token ms", "from disk ms", "process ms", "own MB", "mapped MB",
    "peak MB",
]  # fmt: skip


def quantized_folder(folder: Path, layers: int) -> None:
    """A quantized model of mamba-130m's shape with random weights."""
    model = random_model(layers)
    config = copy.deepcopy(model.config)
    packed = quantize_(model, [random_tokens(model, *CALIBRATION)], recipe("w8a8"))
    save(packed, config, folder)


def drop_from_cache(folder: Path) -> None:
    """Makes the next read of a folder's files come from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, way: str, cache: str, threads: int) -> dict[str, float]:
    """One run of a way in a new process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    call, _, verify = WAYS[way]
    if cache == "cold":
        drop_from_cache(folder)
    arguments = [str(folder), call, json_module.dumps(verify), str(threads), repr(time.time())]
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_token", *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    values: dict[str, float] = json_module.loads(done.stdout.splitlines()[-1])
    return values


def rows_of(folder: Path, rounds: int, threads: int) -> list[report.Row]:
    """The quickest of some rounds of each way, first without the packed image, then with it."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    for is_mapped in (False, True):
        for image in folder.glob(IMAGE_GLOB):
            image.unlink()
        if is_mapped:
            prepack(folder)
            os.sync()
        ways = [way for way, (_, mapped, _) in WAYS.items() if mapped is is_mapped]
        for round_, way, cache in itertools.product(range(rounds), ways, CACHES):
            show_progress(f"{way}, {cache}, round {round_ + 1}")
            values = measured(folder, way, cache, threads)
            so_far = best.get((way, cache), values)
            best[way, cache] = min(so_far, values, key=lambda row: row["from_disk_ms"])
    return [
        {"op": way, "shape": cache, **best[way, cache]}
        for way, cache in itertools.product(WAYS, CACHES)
    ]


def cells(row: report.Row) -> list[str]:
    """A row as text, in the order of HEADER."""
    names = ("imports_ms", "load_ms", "first_token_ms", "from_disk_ms", "process_ms")
    names += ("own_mb", "mapped_mb", "peak_mb")
    return [row["op"], row["shape"], *(f"{row[name]:,.0f}" for name in names)]


def run(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", exists=True, file_okay=False, help="Quantized; default: random weights."
        ),
    ] = None,
    layers: Annotated[
        int, typer.Option(min=1, help="Of random weights of the mamba-130m shape; it has 24.")
    ] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Processes a row; the best counts.")] = 5,
    isa: IsaName = None,
    threads: Threads = None,
    json: JsonFile = None,
    output_dir: OutputDir = Path("bench-output"),
) -> None:
    """Time loading and the first token, with weights packed at load and mapped from a packed image."""
    try:
        described = prepare(threads, isa)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if isa is not None:
        os.environ["MAMBAQUANT_CPU_ISA"] = isa  # of the processes
    with tempfile.TemporaryDirectory(prefix="load") as name:
        folder = Path(name)
        if model is None:
            quantized_folder(folder, layers)
        else:
            shutil.copytree(model, folder, dirs_exist_ok=True)
        os.sync()  # only clean pages can be dropped
        rows = rows_of(folder, rounds, torch.get_num_threads())
    values = {
        "schema": report.SCHEMA,
        "command": "load",
        "model": f"{M130.name} random, {layers} layers" if model is None else model.name,
        "prompt": PROMPT,
        "rounds": rounds,
        "machine": described,
        "rows": rows,
    }
    finish(
        "From disk to the first token",
        values,
        HEADER,
        [cells(row) for row in rows],
        json or output_dir / "load.json",
    )


if __name__ == "__main__":
    typer.run(run)
