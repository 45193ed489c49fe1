"""Times whole models, integer beside float32: `python -m bench.model`. See bench/README.md."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import report
from bench.harness import interleave
from bench.report import OURS
from bench.run import IsaName, JsonFile, OutputDir, Threads, finish, prepare, show_progress
from bench.shapes import M130
from mambaquant_ext import Fidelity, quantize_, recipe
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.model.hf import import_transformers
from mambaquant_ext.run.swap import swap_

DOCS_FOLDER = Path(__file__).parents[1] / "tests" / "data" / "mamba-lm-docs"
VOCABULARY = 50280  # of the mamba-130m checkpoints
PREFILL = ((1, 512), (8, 512))  # batch, tokens
DECODE = (1, 16)  # batch
PROMPT = 16  # tokens before the decoded ones
CALIBRATION = (8, 256)  # batch, tokens
FLOAT = "transformers float32"
HEADER = ["phase", "shape", "median us", "quartiles us", "best us", "tokens/s", "x baseline"]
CHECKED = (2, 64)
# Both compute the same function; roundings that fall the other way grow from layer to layer. A
# wrong kernel gives 0 dB.
LEAST_SQNR_DB = 15.0


def random_model(layers: int) -> Any:
    """mamba-130m's shape with transformers' initial weights, and fewer layers."""
    transformers = import_transformers()
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=M130.hidden,
        num_hidden_layers=layers,
        state_size=M130.dstate,
        time_step_rank=M130.dt_rank,
        conv_kernel=M130.width,
    )
    return transformers.MambaForCausalLM(config).eval()


def quantized(model: Any) -> tuple[Any, Any]:
    """Two copies of the model in int8, by the recipe w8a8, calibrated on random tokens.

    Returns:
        The one on int8 kernels, and its emulation in float32, the reference.
    """
    integer, emulated = copy.deepcopy(model), copy.deepcopy(model)
    packed = quantize_(integer, [random_tokens(model, *CALIBRATION)], recipe("w8a8"))
    swap_(emulated, packed, Fidelity.EMULATED)
    return integer, emulated


def random_tokens(model: Any, batch: int, tokens: int) -> Tensor:
    """(batch, tokens) ids."""
    return torch.randint(0, model.config.vocab_size, (batch, tokens))


def prefill(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A call that reads a prompt and gives the logits of its last token, as generate() does."""

    @torch.no_grad()
    def call() -> Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits

    return call


def decode(model: Any, batch: int) -> Callable[[], Tensor]:
    """A call that reads one token a sequence, behind a prompt. The cache goes on from call to call."""
    ids = random_tokens(model, batch, 1)
    with torch.no_grad():
        cache = model(random_tokens(model, batch, PROMPT), use_cache=True).cache_params

    @torch.no_grad()
    def call() -> Tensor:
        return model(ids, use_cache=True, cache_params=cache).logits

    return call


@torch.no_grad()
def check(integer: Any, emulated: Any) -> None:
    """The integer model's logits are those of its emulation.

    Raises:
        AssertionError: below LEAST_SQNR_DB.
    """
    ids = random_tokens(integer, *CHECKED)
    expected = emulated(ids, use_cache=False).logits.double()
    error = integer(ids, use_cache=False).logits.double() - expected
    sqnr = float(10 * torch.log10(expected.square().sum() / error.square().sum()))
    assert sqnr >= LEAST_SQNR_DB, f"logits: expected {LEAST_SQNR_DB} dB, got {sqnr:.1f}"


def phases(
    integer: Any, floating: Any
) -> Iterator[tuple[str, str, int, dict[str, Callable[[], Tensor]]]]:
    """Phase, shape, tokens a call reads, callables."""
    for batch, tokens in PREFILL:
        ids = random_tokens(floating, batch, tokens)
        pair = {OURS: prefill(integer, ids), FLOAT: prefill(floating, ids)}
        yield "prefill", f"batch {batch}, {tokens} tokens", batch * tokens, pair
    for batch in DECODE:
        yield (
            "decode",
            f"batch {batch}",
            batch,
            {
                OURS: decode(integer, batch),
                FLOAT: decode(floating, batch),
            },
        )


def rows_of(name: str, floating: Any, seconds: float) -> list[report.Row]:
    """Checks a model, then times each phase, integer and float in turn."""
    integer, emulated = quantized(floating)
    check(integer, emulated)
    del emulated
    rows = []
    for phase, shape, tokens, pair in phases(integer, floating):
        show_progress(f"{phase} {name} {shape}")
        timings = interleave(pair, seconds, minimum_rounds=3)
        rows.append({
            "op": phase,
            "shape": f"{name}, {shape}",
            "tokens": tokens,
            **report.timing_values(timings),
            "tokens_per_second": tokens / (timings[OURS].median_us * 1e-6),
        })  # fmt: skip
    return rows


def cells(row: report.Row) -> list[str]:
    """A row as text, in the order of HEADER."""
    return [
        row["op"], row["shape"], *report.timing_cells(row["timings"][OURS]),
        f"{row['tokens_per_second']:,.0f}", report.baseline_cell(row),
    ]  # fmt: skip


def run(
    layers: Annotated[int, typer.Option(min=1, help="Of the mamba-130m shape; it has 24.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of sampling, per callable.")] = 1.0,
    isa: IsaName = None,
    threads: Threads = None,
    json: JsonFile = None,
    output_dir: OutputDir = Path("bench-output"),
) -> None:
    """Time prefill and decode of whole models, the integer model beside transformers' float32."""
    try:
        described = prepare(threads, isa)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    models = {
        "mamba-lm-docs": lambda: load_float_model(DOCS_FOLDER),
        f"{M130.name} random, {layers} layers": lambda: random_model(layers),
    }
    rows = [row for name, make in models.items() for row in rows_of(name, make(), seconds)]
    values = {
        "schema": report.SCHEMA,
        "command": "model",
        "seconds": seconds,
        "machine": described,
        "rows": rows,
    }
    body = [cells(row) for row in rows]
    finish("Whole models", values, HEADER, body, json or output_dir / "model.json")


if __name__ == "__main__":
    typer.run(run)
