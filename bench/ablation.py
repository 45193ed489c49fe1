"""What each part of the method is worth: perplexity and per-layer signal-to-noise, one switch after another, and
the whole method with one switch off.

    python -m bench.ablation [--bits 8,6,4] [--windows N] [--json FILE]

First tables: static ranges, absolute maximum, one scale a tensor, until the last row. Last table: the method's own
ranges, narrowest of the bit widths, one part off a row. The head and the embedding stay float, so that the rows
differ in the blocks alone. W8A8 runs on the int8 kernels, fewer bits emulated. The gate has 8 bits throughout.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import docs_model
from bench.machine import describe
from mambaquant_ext.artifacts import MomentStats, RangeStats
from mambaquant_ext.calibrate import LanguageRun, collect_moments, collect_ranges
from mambaquant_ext.cli.console import print_table, progress_bar, quiet_libraries
from mambaquant_ext.config import Fidelity, Granularity, Observer, Recipe, Rotation, recipe
from mambaquant_ext.model import mixer_forward
from mambaquant_ext.model.checkpoint import skeleton
from mambaquant_ext.model.hf import language_model_weights
from mambaquant_ext.pack import pack_blocks
from mambaquant_ext.pipeline import LanguageSource
from mambaquant_ext.run.emulate import emulated_weights, rounding_tap
from mambaquant_ext.run.swap import swap_
from mambaquant_ext.transform import needs_folded_norms

SIGNAL_WINDOWS = 4


def steps() -> dict[str, Recipe]:
    """Row label to recipe; each row adds to the one above."""
    rtn = recipe("rtn").replace(quantize_head=False, quantize_embedding=False)
    hadamard = rtn.replace(residual_rotation=Rotation.HADAMARD, dt_rotation=Rotation.HADAMARD)
    klt = hadamard.replace(residual_rotation=Rotation.KLT, dt_rotation=Rotation.KLT)
    online = klt.replace(out_rotation=True, state_rotation=True)
    smooth = online.replace(smooth_gate=True, smooth_state=True, smooth_dt=True, center_dt=True)
    ranges = smooth.replace(observer=Observer.PERCENTILE, granularity=Granularity.PER_CHANNEL)
    return {
        "RTN": rtn,
        "+ R1, R5 without K": hadamard,
        "+ K": klt,
        "+ R2, R4 online": online,
        "+ smoothing": smooth,
        "+ ranges per channel": ranges,
    }


def leave_one_out() -> dict[str, Recipe]:
    """Row label to recipe: the whole method, then without each part."""
    whole = recipe("w8a8").replace(quantize_head=False, quantize_embedding=False)
    return {
        "MambaQuant": whole,
        "without K": whole.replace(
            residual_rotation=Rotation.HADAMARD, dt_rotation=Rotation.HADAMARD
        ),
        "without R1": whole.replace(residual_rotation=Rotation.NONE),
        "without R2": whole.replace(out_rotation=False),
        "without R4": whole.replace(state_rotation=False),
        "without R5": whole.replace(dt_rotation=Rotation.NONE),
        "without S2": whole.replace(smooth_gate=False),
        "without S4": whole.replace(smooth_state=False),
        "without S5, centring": whole.replace(smooth_dt=False, center_dt=False),
    }


@torch.no_grad()
def signal_to_noise(
    run: LanguageRun, ranges: RangeStats, chosen: Recipe, ids: torch.Tensor
) -> list[float]:
    """Per layer, dB: the mixer's output in float over its error, each layer fed the float stream."""
    blocks = pack_blocks(run.layers, ranges, chosen)
    residual, decibels = run.model.embedding[ids], []
    for layer, block in zip(run.layers, blocks, strict=True):
        out, _ = mixer_forward(layer, residual)
        rounded = emulated_weights(block, torch.float32)
        noisy, _ = mixer_forward(rounded, residual, tap=rounding_tap(block))
        ratio = out.square().sum() / (noisy - out).square().sum()
        decibels.append(10 * math.log10(float(ratio)))
        residual = residual + out
    return decibels


class Moments:
    """First calibration passes, kept: they depend on nothing but whether norms are folded."""

    def __init__(self, data: docs_model.DocsModel) -> None:
        self.data = data
        self.known: dict[bool, MomentStats] = {}

    def of(self, source: LanguageSource, chosen: Recipe) -> MomentStats:
        is_folded = needs_folded_norms(chosen)
        if is_folded not in self.known:
            run = source.folded_run(chosen)
            with progress_bar("moments", len(self.data.calibration), "batch") as update:
                self.known[is_folded] = collect_moments(run, self.data.calibration, update)
        return self.known[is_folded]


def measure(moments: Moments, label: str, chosen: Recipe, bits: list[int]) -> list[dict[str, Any]]:
    """One row at each bit width; the ranges do not depend on it."""
    data = moments.data
    source = LanguageSource(language_model_weights(data.model))
    run = source.transformed_run(moments.of(source, chosen), chosen)
    count = len(data.calibration)
    with progress_bar(f"{label}: ranges", count, "batch") as update:
        ranges = collect_ranges(run, data.calibration, chosen, update)
    rows = []
    for width in bits:
        narrow = chosen.replace(weight_bits=width, activation_bits=width)
        packed = source.pack(run, ranges, narrow, {})
        runner = skeleton(data.model.config)
        swap_(runner, packed, Fidelity.INTEGER if width == 8 else Fidelity.EMULATED)
        result = data.evaluate(
            lambda ids, model=runner: model(ids, use_cache=False).logits,
            f"{label}: W{width}A{width}",
        )
        rows.append(
            {
                "step": label,
                "bits": width,
                "perplexity": result.perplexity,
                "sqnr_db": signal_to_noise(run, ranges, narrow, data.test[:SIGNAL_WINDOWS]),
            }
        )
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> None:
    layers = range(len(rows[0]["sqnr_db"]))
    print_table(
        title,
        ["step", "perplexity", *(f"layer {index} dB" for index in layers)],
        [
            [row["step"], f"{row['perplexity']:.3f}", *(f"{d:.1f}" for d in row["sqnr_db"])]
            for row in rows
        ],
    )


def main(
    bits: Annotated[str, typer.Option(help="Bit widths, separated by commas.")] = "8,6,4",
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first test windows.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write figures.")] = None,
) -> None:
    """Add MambaQuant's parts one after another and print a table for each bit width."""
    widths = [int(width) for width in bits.split(",")]
    machine = describe([])
    data = docs_model.load()
    if windows is not None:
        data = docs_model.DocsModel(
            data.model, data.tokenizer, data.calibration, data.test[:windows], data.bytes_per_token
        )
    moments = Moments(data)
    added: list[dict[str, Any]] = []
    removed: list[dict[str, Any]] = []
    with quiet_libraries():
        for label, chosen in steps().items():
            added += measure(moments, label, chosen, widths)
        for label, chosen in leave_one_out().items():
            removed += measure(moments, label, chosen, [min(widths)])
    for width in widths:
        title = f"W{width}A{width}, static; each row adds to the one above"
        table(title, [row for row in added if row["bits"] == width])
    table(f"W{min(widths)}A{min(widths)}, static; each row lacks one part", removed)
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": machine, "added": added, "removed": removed}, indent=2) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
