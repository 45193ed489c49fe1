"""`mambaquant eval`: perplexity and bits per byte, the quantized model beside the float one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mambaquant_ext.artifacts.files import METADATA_FILE
from mambaquant_ext.checkpoint import load
from mambaquant_ext.cli.console import print_json, print_table, progress_bar, quiet_libraries
from mambaquant_ext.cli.quantize import ModelFolder, WindowLength, folder_bytes
from mambaquant_ext.cli.text import check_vocabulary, load_tokenizer, token_windows
from mambaquant_ext.config import Fidelity
from mambaquant_ext.evaluate import Evaluation
from mambaquant_ext.evaluate import evaluate as evaluate_windows
from mambaquant_ext.model.checkpoint import load_float_model


def evaluate(
    model: ModelFolder,
    text: Annotated[
        Path, typer.Option("--text", exists=True, dir_okay=False, help="UTF-8 text to evaluate on.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            "--float", exists=True, file_okay=False, help="Float model folder to set beside."
        ),
    ] = None,
    window: WindowLength = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first windows.")] = None,
    emulated: Annotated[
        bool, typer.Option(help="Emulate in float instead of int8 kernels.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity in non-overlapping windows, each from a zero state."""
    fidelity = Fidelity.EMULATED if emulated else Fidelity.INTEGER
    results: dict[str, dict[str, Any]] = {}
    with quiet_libraries():
        tokenizer = load_tokenizer(model)
        all_windows, bytes_per_token = token_windows(text, tokenizer, window)
        all_windows = all_windows[:limit]
        for folder in [model] if against is None else [against, model]:
            is_quantized = folder is model and (folder / METADATA_FILE).is_file()
            runner = load(folder, fidelity) if is_quantized else load_float_model(folder)
            check_vocabulary(all_windows, runner.config.vocab_size, model)
            name = fidelity.value if is_quantized else "float32"
            with progress_bar(name, len(all_windows), "window") as update:
                result = evaluate_windows(
                    lambda ids, run=runner: run(ids, use_cache=False).logits,  # type: ignore[misc]
                    all_windows,
                    bytes_per_token,
                    batch,
                    update,
                )
            results[name] = {**result.to_dict(), "size_bytes": folder_bytes(folder)}
    if json:
        print_json(results)
        return
    header = ["model", "perplexity", "bits per byte", "MB", "tok/s"]
    print_table(
        f"{text.name}, {len(all_windows)} windows of {window}",
        header,
        [
            [
                name,
                *evaluation_cells(
                    Evaluation(**{k: v for k, v in row.items() if k != "size_bytes"}),
                    row["size_bytes"],
                ),
            ]
            for name, row in results.items()
        ],
    )


def evaluation_cells(result: Evaluation, size_bytes: int) -> list[str]:
    """Perplexity, bits per byte, megabytes, tokens per second, as table cells."""
    return [
        f"{result.perplexity:.3f}",
        f"{result.bits_per_byte:.4f}",
        f"{size_bytes / 1e6:.2f}",
        f"{result.tokens_per_second:,.0f}",
    ]
