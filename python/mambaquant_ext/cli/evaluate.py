"""`mambaquant eval`: perplexity on text or top-1 accuracy on images, the quantized model beside the float one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mambaquant_ext.checkpoint import load
from mambaquant_ext.cli.console import print_json, print_table, progress_bar, quiet_libraries
from mambaquant_ext.cli.data import check_float_model, evaluation_data
from mambaquant_ext.cli.models import folder_bytes, is_quantized
from mambaquant_ext.cli.options import ModelFolder, WindowLength, count_help
from mambaquant_ext.config import Fidelity
from mambaquant_ext.model.checkpoint import load_float_model

BATCH = {"window": 8, "image": 32}


def evaluate(
    model: ModelFolder,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            exists=True,
            dir_okay=False,
            help="UTF-8 text to evaluate a language model on.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            exists=True,
            help="Labelled images to evaluate a vision model on: .npz, a folder, or an idx file.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--float", exists=True, file_okay=False, help="Float model folder to set beside."
        ),
    ] = None,
    window: WindowLength = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help=count_help("Per forward pass", BATCH))
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first windows or images.")
    ] = None,
    emulated: Annotated[
        bool, typer.Option(help="Emulate in float instead of int8 kernels.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity in non-overlapping windows, each from a zero state, or accuracy on images."""
    fidelity = Fidelity.EMULATED if emulated else Fidelity.INTEGER
    results: dict[str, dict[str, Any]] = {}
    with quiet_libraries():
        if against is not None:
            check_float_model(against, model)
        data = evaluation_data(model, text, images, window, limit)
        reference = None
        for folder in [model] if against is None else [against, model]:
            runs_int8 = folder is model and is_quantized(folder)
            runner = load(folder, fidelity) if runs_int8 else load_float_model(folder)
            name = fidelity.value if runs_int8 else "float32"
            with progress_bar(name, len(data), data.unit) as update:
                score = data.score(runner, batch or BATCH[data.unit], update)
            figures = data.figures(score, reference)
            results[name] = {**figures, "size_bytes": folder_bytes(folder)}
            reference = score
    if json:
        print_json(results)
        return
    rows = [
        {"model": name, **data.cells(figures), "MB": f"{figures['size_bytes'] / 1e6:.2f}"}
        for name, figures in results.items()
    ]
    print_table(data.title, list(rows[0]), [list(row.values()) for row in rows])
