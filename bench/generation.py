"""Times what a generated token costs besides the model: `python -m bench.generation`. See bench/README.md.

The loop runs over a model that gives the same logits again and again and takes no time: what is left is Python, the
sampler and the decoding of text. Baselines: transformers' processors and a draw in torch, without a loop or text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tests.reference import sampling as reference
from tokenizers import Tokenizer
from torch import Tensor

from bench import docs_model, report
from bench.command import (
    IsaName,
    JsonFile,
    OutputDir,
    Threads,
    finish,
    prepare,
    result,
    show_progress,
)
from bench.harness import interleave
from bench.report import OURS
from bench.shapes import VOCABULARY
from mambaquant_ext import GenerationOptions, stream
from mambaquant_ext.generation import Sampler
from mambaquant_ext.model.hf import import_transformers

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition penalty": {"repetition_penalty": 1.1},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "all of them": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature": {"temperature": 0.8},
}
# The standard deviation of the logits: a trained model's are about 3; random weights give nearly equal ones.
SPREADS = {"peaked": 3.0, "flat": 0.1}
PROMPT = list(range(100, 612))
HEADER = ["options", "logits", "median us", "quartiles us", "best us", "x baseline"]
TRANSFORMERS = "transformers"
LARGEST_ERROR = 1e-5


class FixedModel:
    """A model whose logits never change."""

    vocab_size = VOCABULARY

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def new_state(self, batch: int = 1) -> None:
        """None is needed."""

    def forward(self, ids: Tensor, state: None, out: Tensor | None = None) -> Tensor:
        """The logits."""
        return self.logits


def make_logits(spread: float) -> Tensor:
    """(1, vocabulary), with text's tokens ahead of those that the tokenizer lacks."""
    logits = torch.randn(1, VOCABULARY) * spread
    logits[:, 4096:] -= spread
    return logits


def ours(logits: Tensor, options: dict[str, Any], tokenizer: Tokenizer) -> Callable[[], object]:
    """A step of the loop, with text and a stop string."""
    full = GenerationOptions(max_new_tokens=1 << 40, stop=("\n\nQ:",), **options)
    steps = stream(FixedModel(logits), PROMPT, full, tokenizer)
    return lambda: next(steps)


def by_transformers(logits: Tensor, options: dict[str, Any]) -> Callable[[], object]:
    """The same processors and draw in torch."""
    kinds = import_transformers().generation.logits_process
    seen = torch.tensor([PROMPT])
    processors = [
        kind(options[name])
        for name, kind in {
            "repetition_penalty": kinds.RepetitionPenaltyLogitsProcessor,
            "temperature": kinds.TemperatureLogitsWarper,
            "top_k": kinds.TopKLogitsWarper,
            "top_p": kinds.TopPLogitsWarper,
        }.items()
        if name in options
    ]
    is_greedy = "temperature" not in options

    def call() -> Tensor:
        scores = logits
        for process in processors:
            scores = process(seen, scores)
        return scores.argmax(-1) if is_greedy else torch.multinomial(scores.softmax(-1), 1)

    return call


def check(logits: Tensor, options: dict[str, Any]) -> None:
    """The sampler's probabilities are those of the reference.

    Raises:
        AssertionError: they are not.
    """
    sampler = Sampler(1, VOCABULARY, GenerationOptions(**options))
    sampler.observe(torch.tensor([PROMPT]))
    actual = sampler.probabilities(logits)[0]
    names = {"repetition_penalty": "penalty"}
    wanted = {names.get(name, name): value for name, value in options.items()}
    if "temperature" in options:
        expected = reference.probabilities(logits[0], PROMPT, **wanted)
    else:
        scores = reference.penalised(logits[0], PROMPT, options.get("repetition_penalty", 1.0))
        expected = torch.zeros_like(actual)
        expected[scores.argmax()] = 1.0
    error = float((actual - expected).abs().max() / expected.max())
    assert error < LARGEST_ERROR, f"probabilities: off by {error:.3g} of the largest"


def rows_of(seconds: float) -> list[report.Row]:
    """Checks and times every case."""
    tokenizer = Tokenizer.from_file(str(docs_model.FOLDER / "tokenizer.json"))
    rows = []
    for shape, spread in SPREADS.items():
        logits = make_logits(spread)
        for name, options in OPTIONS.items():
            show_progress(f"{name}, {shape}")
            check(logits, options)
            calls = {
                OURS: ours(logits, options, tokenizer),
                TRANSFORMERS: by_transformers(logits, options),
            }
            timings = interleave(calls, seconds)
            rows.append({"op": name, "shape": shape, **report.timing_values(timings)})
    return rows


def run(
    seconds: Annotated[float, typer.Option(min=0.01, help="Of sampling, per callable.")] = 0.5,
    isa: IsaName = None,
    threads: Threads = None,
    json: JsonFile = None,
    output_dir: OutputDir = Path("bench-output"),
) -> None:
    """Time Python, sampling and decoding of text, one token of a vocabulary of 50,280."""
    described = prepare(threads, isa)
    rows = rows_of(seconds)
    values = result("generation", described, seconds=seconds, rows=rows)
    body = [
        [row["op"], row["shape"], *report.timing_cells(row["timings"][OURS]), report.baseline_cell(row)]
        for row in rows
    ]  # fmt: skip
    finish(
        "A token besides the model", values, HEADER, body, json or output_dir / "generation.json"
    )


if __name__ == "__main__":
    typer.run(run)
