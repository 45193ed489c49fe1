"""The main job, on a real model: calibrate, rotate, pack to int8, save, reload, evaluate, generate.

    python -m bench.demo [--output-dir demo-output] [--json FILE]

Ends with a table: perplexity, size on disk and speed of the float model and of four int8 recipes. The float
model is transformers' MambaForCausalLM in float32; every quantized row runs on the int8 kernels. Speeds are
measured in one process, in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import command, docs_model, report
from bench.harness import interleave
from bench.machine import describe
from mambaquant_ext import load, recipe, save
from mambaquant_ext.cli.console import (
    print_line,
    print_table,
    progress_bar,
    quiet_libraries,
)
from mambaquant_ext.cli.models import folder_bytes
from mambaquant_ext.pipeline import quantize_source, source_of

RECIPES = {"RTN": "rtn", "SmoothQuant": "smoothquant", "QuaRot": "quarot", "MambaQuant": "w8a8"}
PREFILL_TOKENS, DECODE_TOKENS = 512, 64
PROMPT = "The function returns"


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """Greedy decoding of DECODE_TOKENS tokens after a short prompt."""

    def run() -> None:
        out = model(ids, use_cache=True)
        for _ in range(DECODE_TOKENS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, cache_params=out.cache_params, use_cache=True)

    return run


def quantize(data: docs_model.DocsModel, name: str, folder: Path) -> None:
    """Calibrates, packs and saves one recipe."""
    passes = ("moments", "ranges")
    batches = len(data.calibration)
    with progress_bar(f"{name}: calibrating", len(passes) * batches, "batch") as update:
        packed = quantize_source(
            source_of(data.model),
            data.calibration,
            recipe(RECIPES[name]),
            lambda stage, done, total: update(passes.index(stage) * total + done),
            seed=0,
        )
    save(packed, data.model.config, folder, docs_model.FOLDER)


def speeds(models: dict[str, Any], test: torch.Tensor) -> dict[str, dict[str, float]]:
    """Tokens per second of each model, prompt reading and decoding, interleaved."""
    with torch.no_grad():
        read = interleave(
            {name: prefill(model, test[:1]) for name, model in models.items()},
            seconds=1.0,
            minimum_rounds=5,
        )
        write = interleave(
            {name: decode(model, test[:1, :8]) for name, model in models.items()},
            seconds=1.0,
            minimum_rounds=5,
        )
    return {
        name: {
            "prefill_tokens_per_second": PREFILL_TOKENS / (read[name].median_us * 1e-6),
            "decode_tokens_per_second": DECODE_TOKENS / (write[name].median_us * 1e-6),
        }
        for name in models
    }


def generate(model: Any, tokenizer: Any) -> str:
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    return str(tokenizer.decode(out[0].tolist()))


def run(output_dir: Path) -> list[dict[str, Any]]:
    data = docs_model.load()
    models: dict[str, Any] = {"float32": data.model}
    sizes = {"float32": folder_bytes(docs_model.FOLDER)}
    for name, preset in RECIPES.items():
        folder = output_dir / preset
        quantize(data, name, folder)
        models[name] = load(folder)
        sizes[name] = folder_bytes(folder)
    rows = []
    for name, model in models.items():
        result = data.evaluate(
            lambda ids, model=model: model(ids, use_cache=False).logits, f"{name}: perplexity"
        )
        rows.append({"model": name, **result.to_dict(), "size_bytes": sizes[name]})
    measured = speeds(models, data.test)
    rows = [{**row, **measured[row["model"]]} for row in rows]
    print_line(f"MambaQuant continues: {generate(models['MambaQuant'], data.tokenizer)}\n")
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    reference = rows[0]["perplexity"]
    print_table(
        "mamba-lm-docs, test.txt. Quantized rows: W8A8, static ranges, int8 kernels",
        ["model", "perplexity", "loss", "bits/byte", "MB", "prompt tok/s", "decode tok/s"],
        [
            [
                row["model"],
                f"{row['perplexity']:.3f}",
                f"{100 * (row['perplexity'] / reference - 1):+.2f} %",
                f"{row['bits_per_byte']:.4f}",
                f"{row['size_bytes'] / 1e6:.2f}",
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_tokens_per_second']:,.0f}",
            ]
            for row in rows
        ],
    )
    print_line(
        "float32 computes in float32 with transformers' PyTorch path; its file on disk is float16."
    )


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("demo-output"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write figures.")] = None,
) -> None:
    """Quantize the small language model four ways and set the results beside float32."""
    machine = describe([])
    with quiet_libraries():
        rows = run(output_dir)
    table(rows)
    if json_file is not None:
        report.write_json(command.result("demo", machine, rows=rows), json_file)


if __name__ == "__main__":
    typer.run(main)
