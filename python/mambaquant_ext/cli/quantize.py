"""`mambaquant quantize`: a float model folder and calibration data in, a quantized folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambaquant_ext.checkpoint import save
from mambaquant_ext.cli.console import print_json, print_line, progress_bar, quiet_libraries
from mambaquant_ext.cli.data import calibration_data
from mambaquant_ext.cli.models import folder_bytes
from mambaquant_ext.cli.options import ModelFolder, RecipeName, WindowLength, count_help
from mambaquant_ext.config import recipe
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.pipeline import quantize_source, source_of

# By unit of the data.
SAMPLES = {"window": 64, "image": 256}
BATCH = {"window": 4, "image": 32}


def quantize(
    model: ModelFolder,
    calib: Annotated[
        Path,
        typer.Option(
            "--calib", exists=True, help="UTF-8 text, or images: .npz, a folder, or an idx file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Folder to write.")],
    recipe_name: RecipeName = "w8a8",
    window: WindowLength = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help=count_help("Of the data, at most", SAMPLES))
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help=count_help("Per forward pass", BATCH))
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Calibrate, rotate, smooth and pack a Mamba model: on text a language model, on images a vision model."""
    if out.resolve() == model.resolve():
        raise typer.BadParameter(
            "expected another folder than the float model's", param_hint="--out"
        )
    with quiet_libraries():
        data = calibration_data(model, calib, window)
        source = load_float_model(model)
        batches = data.batches(
            source, samples or SAMPLES[data.unit], batch or BATCH[data.unit], seed
        )
        passes = ("moments", "ranges")
        with progress_bar("calibrating", len(passes) * len(batches), "batch") as update:
            packed = quantize_source(
                source_of(source),
                batches,
                recipe(recipe_name),
                lambda stage, done, total: update(passes.index(stage) * total + done),
                seed,
            )
        save(packed, source.config, out, model)
    size = folder_bytes(out)
    if json:
        print_json(
            {
                "out": str(out),
                "recipe": packed.recipe.to_dict(),
                "size_bytes": size,
                "calibration": dict(packed.provenance),
            }
        )
    else:
        used = data.pieces(sum(map(len, batches)))
        print_line(f"{out}: {recipe_name}, {size / 1e6:.2f} MB, calibrated on {used}")
