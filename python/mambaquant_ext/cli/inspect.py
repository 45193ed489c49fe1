"""`mambaquant inspect`: what the transforms do to a float model, or what a quantized folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambaquant_ext.artifacts import load_packed
from mambaquant_ext.checkpoint import packed_images
from mambaquant_ext.cli.console import (
    print_json,
    print_line,
    print_table,
    progress_bar,
    quiet_libraries,
)
from mambaquant_ext.cli.data import calibration_data
from mambaquant_ext.cli.models import folder_bytes, is_quantized
from mambaquant_ext.cli.options import ModelFolder, RecipeName, WindowLength, count_help
from mambaquant_ext.cli.plot import plot_transforms
from mambaquant_ext.cli.quantize import BATCH
from mambaquant_ext.config import recipe
from mambaquant_ext.inspection import SiteStatistics, inspect_transforms, transform_steps
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.pipeline import source_of

SAMPLES = {"window": 8, "image": 32}


def inspect(
    model: ModelFolder,
    calib: Annotated[
        Path | None,
        typer.Option(
            "--calib",
            exists=True,
            help="UTF-8 text, or images: .npz, a folder, or an idx file; needed for a float model.",
        ),
    ] = None,
    recipe_name: RecipeName = "w8a8",
    window: WindowLength = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help=count_help("Of the data, at most", SAMPLES))
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the samples.")] = 0,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="PNG file to write.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show channel spread and outliers per layer, before and after each transform."""
    if is_quantized(model):
        _inspect_quantized(model, json)
        return
    if calib is None:
        raise typer.BadParameter(
            "expected text or images to measure a float model on", param_hint="--calib"
        )
    with quiet_libraries():
        data = calibration_data(model, calib, window)
        source = load_float_model(model)
        batches = data.batches(source, samples or SAMPLES[data.unit], BATCH[data.unit], seed)
        with progress_bar("transforms", transform_steps(recipe(recipe_name)), "step") as update:
            rows = inspect_transforms(source_of(source), batches, recipe(recipe_name), update)
    if plot is not None:
        plot_transforms(rows, plot)
    if json:
        print_json([row.to_dict() for row in rows])
        return
    print_table(
        f"{model.name}, {recipe_name}",
        ["layer", "tensor", "step", "variance max/median", "max/rms"],
        [_cells(row) for row in _by_tensor(rows)],
    )
    if plot is not None:
        print_line(f"plot: {plot}")


def _by_tensor(rows: list[SiteStatistics]) -> list[SiteStatistics]:
    """Grouped by layer and site, steps in their order (sorting is stable)."""
    return sorted(rows, key=lambda row: (row.layer, row.site))


def _cells(row: SiteStatistics) -> list[str]:
    return [
        str(row.layer),
        row.site,
        row.step,
        f"{row.variance_spread:.2f}",
        f"{row.max_over_rms:.1f}",
    ]


def _inspect_quantized(folder: Path, json: bool) -> None:
    packed = load_packed(folder, verify=True)
    images = packed_images(folder)
    values = {
        "adapter": packed.adapter,
        "recipe": packed.recipe.to_dict(),
        "layers": len(packed.blocks),
        "size_bytes": folder_bytes(folder),
        "packed_images": images,
        "calibration": dict(packed.provenance),
    }
    if json:
        print_json(values)
        return
    rows = [["adapter", packed.adapter]]
    rows += [[key, str(value)] for key, value in packed.recipe.to_dict().items()]
    rows += [
        ["layers", str(len(packed.blocks))],
        ["size (MB)", f"{folder_bytes(folder) / 1e6:.2f}"],
    ]
    rows += [[f"packed for {isa}", state] for isa, state in images.items()]
    rows += [[f"calibration {key}", str(value)] for key, value in packed.provenance.items()]
    print_table(folder.name, ["field", "value"], rows)
