"""The files of random language models: the formats of every engine, kept on disk between runs.

    python -m bench.cpu.models.files mamba-130m FOLDER F16 Q8_0

makes what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.cpu.engines.engine import FLOAT, PREPACKED, W8A8
from bench.cpu.models import gguf
from bench.cpu.models.random_model import SEED, calibration, deepened, prompts, random_model
from bench.machine import available_bytes
from bench.shapes import LANGUAGE_MODELS, LanguageShape
from mambaquant_ext import prepack, quantize_, recipe, save
from mambaquant_ext.artifacts.files import FORMAT_VERSION
from mambaquant_ext.model.checkpoint import load_float_model

REFERENCE = "logits.npy"
# So many blocks differ, and stand one after another until there are as many as the model has. Quantizing those alone
# takes seconds where all would take minutes, and ten times the float model's memory. No engine knows that they repeat.
DISTINCT = 4
MAKING_BYTES_PER_PARAMETER = 12  # while the float model is written
CHECKED = (2, 32)  # batch, tokens


class ModelError(RuntimeError):
    """A model could not be made."""


def folder_of(shape: LanguageShape, root: Path) -> Path:
    """Where a model's files are; another layout of checkpoints gets another folder."""
    return root / f"{shape.name}-{FORMAT_VERSION}"


def formats(folder: Path, shape: LanguageShape) -> dict[str, Callable[[Path], None]]:
    """Every file or folder of a model: its name, and what writes it to a path."""

    shallow = replace(shape, layers=min(DISTINCT, shape.layers))

    def write_float(path: Path) -> None:
        deepened(random_model(shallow), shape.layers).save_pretrained(path)

    def write_reference(path: Path) -> None:
        ids = prompts(shape, *CHECKED)
        with torch.no_grad():
            logits = load_float_model(folder / FLOAT)(ids, logits_to_keep=1).logits[:, -1]
        with path.open("wb") as file:
            np.save(file, logits.double().numpy())

    def write_w8a8(path: Path) -> None:
        model = random_model(shallow)
        config = {**model.config.to_dict(), "num_hidden_layers": shape.layers}
        batches = list(calibration(shallow).split(1))
        packed = quantize_(model, batches, recipe("w8a8"), seed=SEED)
        blocks = tuple(packed.blocks[i % len(packed.blocks)] for i in range(shape.layers))
        names = tuple(packed.names[0].replace("0", str(i)) for i in range(shape.layers))
        save(replace(packed, blocks=blocks, names=names), config, path)

    def write_f16(path: Path) -> None:
        gguf.write_f16(load_float_model(folder / FLOAT).state_dict(), shape, path)

    def write_quantized(kind: str) -> Callable[[Path], None]:
        return lambda path: gguf.quantize(folder / "F16.gguf", kind, path)

    return {
        FLOAT: write_float,
        REFERENCE: write_reference,
        W8A8: write_w8a8,
        PREPACKED: lambda path: write_prepacked(folder / W8A8, path),
        "F16.gguf": write_f16,
        **{f"{kind}.gguf": write_quantized(kind) for kind in ("Q8_0", "Q4_0")},
    }


def write_prepacked(source: Path, path: Path) -> None:
    """A quantized model again, sharing its files on disk, with a packed image beside them."""
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).hardlink_to(file)
    prepack(path)


def missing(folder: Path, wanted: Iterable[str]) -> list[str]:
    """The wanted files that are not there, and what they are made from.

    A packed image belongs to the kernels in use, which may be others by now: it is always made anew.
    """
    absent = {name for name in wanted if not (folder / name).exists()} - {PREPACKED}
    if absent & {"Q8_0.gguf", "Q4_0.gguf"}:
        absent.add("F16.gguf")
    if absent:
        absent.add(FLOAT)
    return sorted(absent | ({PREPACKED} & set(wanted)))


def make(folder: Path, shape: LanguageShape, wanted: Sequence[str]) -> None:
    """Writes the wanted files that are not there, each under another name first: a half-written one is never used."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in formats(folder, shape).items():
        path, unfinished = folder / name, folder / f"unfinished-{os.getpid()}-{name}"
        if name == PREPACKED and name in wanted:
            _remove(path)
        if name in wanted and not path.exists():
            try:
                write(unfinished)
                unfinished.rename(path)
            finally:
                _remove(unfinished)


def make_missing(folder: Path, shape: LanguageShape, wanted: Iterable[str]) -> None:
    """As make, in another process: the float model and what quantizing it takes are gone when that ends.

    Raises:
        ModelError: there is too little memory, or it failed; the message holds its last line.
    """
    absent = missing(folder, wanted)
    needed = MAKING_BYTES_PER_PARAMETER * shape.parameters
    if absent != [PREPACKED] and needed > available_bytes():
        raise ModelError(f"making it takes {needed >> 20:,} MiB of memory")
    command = [sys.executable, "-m", "bench.cpu.models.files", shape.name, str(folder), *absent]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelError((done.stderr.strip().splitlines() or ["?"])[-1])


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    name, target, *kinds = sys.argv[1:]
    make(Path(target), LANGUAGE_MODELS[name], kinds)
