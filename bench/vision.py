"""The vision model, quantized in every way: top-1 accuracy, agreement of kernels and emulation, speed.

    python -m bench.vision [--bits 8,6,4] [--limit N] [--no-full] [--json FILE]

Static ranges throughout, from 256 training images. Rows of 8 bits run on the int8 kernels with an int8 head; fewer
bits are emulated, their head and gate stay at float32 and 8 bits. Ranges of the rows that are no MambaQuant are
absolute maxima, one a tensor. With all 10,000 test images (Debian's package dataset-fashion-mnist) the W8A8 row is
measured on these too, integer and emulated. Speeds are taken in one process, in turn.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import fashion_mnist
from bench.harness import interleave
from bench.machine import describe
from mambaquant_ext.artifacts import PackedModel
from mambaquant_ext.cli.console import print_line, print_table, progress_bar
from mambaquant_ext.config import Fidelity, Recipe, recipe
from mambaquant_ext.evaluate import Classification, agreement, classify
from mambaquant_ext.images import ImageSet, load_images, normalise
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.pipeline import quantize_source, source_of
from mambaquant_ext.run import QuantMambaBlock
from mambaquant_ext.run.mixers import EmulatedMixer
from mambaquant_ext.run.swap import swap_

METHODS = {"RTN": "rtn", "SmoothQuant": "smoothquant", "QuaRot": "quarot", "MambaQuant": "w8a8"}
# The states of 8 images fit the caches of the float forward.
BATCH, SPEED_BATCHES, INT8 = 8, (1, 8, 32), 8


class VisionModel:
    """The float model and its images."""

    def __init__(self) -> None:
        self.model = load_float_model(fashion_mnist.FOLDER)
        calibration = load_images(fashion_mnist.CALIBRATION)
        self.calibration = self.prepare(calibration.images).split(32)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(count, 1, 28, 28) uint8 as the model takes it."""
        config = self.model.config
        return normalise(images, config.mean, config.std)

    def packed(self, chosen: Recipe, label: str) -> PackedModel:
        """Calibrates, transforms and packs."""
        passes = ("moments", "ranges")
        total = len(self.calibration)
        with progress_bar(f"{label}: calibrating", 2 * total, "batch") as update:
            return quantize_source(
                source_of(self.model),
                self.calibration,
                chosen,
                lambda stage, done, count: update(passes.index(stage) * count + done),
            )

    def quantized(self, packed: PackedModel, fidelity: Fidelity) -> torch.nn.Module:
        """A copy of the model that runs quantized."""
        runner = copy.deepcopy(self.model)
        swap_(runner, packed, fidelity)
        return runner

    def classify(self, runner: torch.nn.Module, images: ImageSet, label: str) -> Classification:
        """Top-1 of any model."""
        with progress_bar(label, len(images), "image") as update:
            return classify(
                runner, images.images, images.labels, BATCH, prepare=self.prepare, progress=update
            )


def recipe_of(method: str, bits: int) -> Recipe:
    """A method at a bit width."""
    chosen = recipe(METHODS[method])
    if bits == INT8:
        return chosen
    return chosen.replace(weight_bits=bits, activation_bits=bits, quantize_head=False)


def accuracies(
    vision: VisionModel, images: ImageSet, all_images: ImageSet | None, bits: Iterable[int]
) -> list[dict[str, Any]]:
    """One row a method and width."""
    reference = vision.classify(vision.model, images, "float32")
    rows = [{"method": "float32", "bits": 32, **reference.to_dict()}]
    if all_images is not None:
        whole = vision.classify(vision.model, all_images, "float32, all images")
        rows[0]["all_images"] = whole.to_dict()
    for width in bits:
        for method in METHODS:
            label = f"{method} W{width}A{width}"
            packed = vision.packed(recipe_of(method, width), label)
            fidelity = Fidelity.INTEGER if width == INT8 else Fidelity.EMULATED
            runner = vision.quantized(packed, fidelity)
            result = vision.classify(runner, images, label)
            row = {
                "method": method,
                "bits": width,
                **result.to_dict(),
                "agrees_with_float32": agreement(result, reference),
            }
            if width == INT8 and all_images is not None:
                row["all_images"] = vision.classify(runner, all_images, f"{label}, all").to_dict()
            rows.append(row)
            print_line(f"{label}: {100 * row['top1']:.2f} % of {row['images']} images")
    return rows


def in_float64(runner: torch.nn.Module) -> torch.nn.Module:
    """The emulation of a quantized model with every product and sum in float64, in place."""
    for module in runner.modules():
        if isinstance(module, QuantMambaBlock):
            module.executor = EmulatedMixer(module.packed, torch.float64)
    return runner


def against_emulation(vision: VisionModel, images: ImageSet) -> dict[str, Any]:
    """MambaQuant's predictions on the kernels beside those of its emulation in float32 and in float64.

    The two emulations round the same values to the same grids and differ in the last bits of their sums alone: how
    far they agree with each other says how far anything can.
    """
    packed = vision.packed(recipe_of("MambaQuant", INT8), "MambaQuant")
    emulated = vision.quantized(packed, Fidelity.EMULATED)
    runners = {
        "integer": vision.quantized(packed, Fidelity.INTEGER),
        "emulated": emulated,
        "emulated, float64": in_float64(copy.deepcopy(emulated)),
    }
    results = {name: vision.classify(runner, images, name) for name, runner in runners.items()}
    pairs = itertools.combinations(results, 2)
    return {
        "images": len(images),
        "correct": {name: result.correct for name, result in results.items()},
        "equal_predictions": {f"{a} = {b}": agreement(results[a], results[b]) for a, b in pairs},
    }


@torch.no_grad()
def speeds(vision: VisionModel, images: ImageSet) -> list[dict[str, float]]:
    """Images per second of float32 and int8, at each batch size, in turn."""
    packed = vision.packed(recipe_of("MambaQuant", INT8), "MambaQuant")
    int8 = vision.quantized(packed, Fidelity.INTEGER)
    rows = []
    for batch in SPEED_BATCHES:
        x = vision.prepare(images.images[:batch])
        timings = interleave(
            {"float32": lambda x=x: vision.model(x), "int8": lambda x=x: int8(x)},
            seconds=2.0,
            minimum_rounds=5,
        )
        per_second = {name: batch * 1e6 / timing.median_us for name, timing in timings.items()}
        rows.append({"batch": batch, **per_second})
    return rows


def print_accuracies(rows: list[dict[str, Any]]) -> None:
    """Methods down, widths across."""
    widths = sorted({row["bits"] for row in rows[1:]}, reverse=True)
    cell = {(row["method"], row["bits"]): row for row in rows}

    def top1(row: dict[str, Any]) -> str:
        return f"{100 * row['top1']:.2f} ({row['correct']})"

    all_header = ["all images"] if "all_images" in rows[0] else []
    body = []
    for method in METHODS:
        line = [method, *(top1(cell[method, width]) for width in widths)]
        if all_header:
            line.append(top1(cell[method, INT8]["all_images"]) if INT8 in widths else "")
        body.append(line)
    first = ["float32", *([top1(rows[0])] + [""] * (len(widths) - 1))]
    if all_header:
        first.append(top1(rows[0]["all_images"]))
    print_table(
        f"top-1 %, {rows[0]['images']} images",
        ["method", *(f"W{width}A{width}" for width in widths), *(f"{h}, W8A8" for h in all_header)],
        [first, *body],
    )


def main(
    bits: Annotated[str, typer.Option(help="Bit widths, separated by commas.")] = "8,6,4",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    full: Annotated[bool, typer.Option(help="Use all test images where installed.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write figures.")] = None,
) -> None:
    """Measures and prints."""
    machine = describe([])
    vision = VisionModel()
    images = load_images(fashion_mnist.TEST)[:limit]
    path = fashion_mnist.FASHION_MNIST_TEST
    all_images = load_images(path)[:limit] if full and path.is_file() else None
    if full and all_images is None:
        print_line(f"without all test images: {path} is not there")
    widths = [int(width) for width in bits.split(",")]
    rows = accuracies(vision, images, all_images, widths)
    print_accuracies(rows)
    equal = against_emulation(vision, images if all_images is None else all_images)
    for pair, share in equal["equal_predictions"].items():
        print_line(f"equal predictions, {pair}: {100 * share:.2f} % of {equal['images']} images")
    rates = speeds(vision, images)
    print_table(
        "images per second",
        ["batch", "float32", "int8", "ratio"],
        [
            [
                str(row["batch"]),
                f"{row['float32']:,.0f}",
                f"{row['int8']:,.0f}",
                f"{row['int8'] / row['float32']:.1f}",
            ]
            for row in rates
        ],
    )
    if json_file is not None:
        figures = {"machine": machine, "accuracy": rows, "emulation": equal, "speed": rates}
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
