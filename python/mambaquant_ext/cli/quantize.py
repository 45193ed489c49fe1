"""`mambaquant quantize`: a float model folder and a text in, a quantized folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambaquant_ext.checkpoint import save
from mambaquant_ext.cli.console import print_json, print_line, progress_bar, quiet_libraries
from mambaquant_ext.cli.text import check_vocabulary, load_tokenizer, pick_windows, token_windows
from mambaquant_ext.config import PRESETS, recipe
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.pipeline import quantize_source, source_of


def _known_recipe(name: str) -> str:
    if name not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {name!r}")
    return name


ModelFolder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Model folder.")]
CalibrationText = Annotated[
    Path, typer.Option("--calib", exists=True, dir_okay=False, help="UTF-8 text to calibrate on.")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", callback=_known_recipe, help=f"One of {', '.join(PRESETS)}.")
]
WindowLength = Annotated[int, typer.Option("--window", min=2, help="Tokens per sequence.")]


def quantize(
    model: ModelFolder,
    calib: CalibrationText,
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Folder to write.")],
    recipe_name: RecipeName = "w8a8",
    window: WindowLength = 512,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 4,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Calibrate, rotate, smooth and pack a Mamba language model."""
    if out.resolve() == model.resolve():
        raise typer.BadParameter(
            "expected another folder than the float model's", param_hint="--out"
        )
    with quiet_libraries():
        source = load_float_model(model)
        tokenizer = load_tokenizer(model)
        chosen = pick_windows(token_windows(calib, tokenizer, window)[0], samples, seed)
        check_vocabulary(chosen, source.config.vocab_size, model)
        batches = list(chosen.split(batch))
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
        print_line(
            f"{out}: {recipe_name}, {size / 1e6:.2f} MB, calibrated on {len(chosen)} sequences of {window} tokens"
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights in a model folder."""
    names = ("*.safetensors", "pytorch_model*.bin")
    return sum(path.stat().st_size for name in names for path in folder.glob(name))
