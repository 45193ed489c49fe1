"""`mambaquant generate`: text from a quantized (or float) model, streamed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mambaquant_ext.checkpoint import end_tokens, load_runner
from mambaquant_ext.cli.console import print_json, quiet_libraries
from mambaquant_ext.cli.models import is_quantized
from mambaquant_ext.cli.options import ModelFolder
from mambaquant_ext.cli.text import check_vocabulary, load_tokenizer, read_stdin, read_text
from mambaquant_ext.generation import (
    Generation,
    GenerationOptions,
    ModuleRunner,
    Runner,
    stream,
)
from mambaquant_ext.model.checkpoint import load_float_model, vision_config

STDIN = Path("-")


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("expected one of --prompt and --prompt-file")
    if prompt is not None:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise typer.BadParameter("prompt: expected UTF-8 text")
        return prompt
    assert file is not None
    if file == STDIN:
        return read_stdin()
    if not file.is_file():
        raise typer.BadParameter(f"expected a file, found none at {file}")
    return read_text(file)


def _open_model(folder: Path) -> tuple[Runner[Any], tuple[int, ...]]:
    """What reads tokens, and the tokens that end a text."""
    if is_quantized(folder):
        return load_runner(folder), end_tokens(folder)
    model = load_float_model(folder)
    eos = model.generation_config.eos_token_id
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return ModuleRunner(model), eos_ids


def _report(prompt: str, result: Generation, as_json: bool) -> None:
    (sequence,) = result.sequences
    assert sequence.finish is not None
    first_ms = result.time_to_first_token * 1e3
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": sequence.text,
                "tokens": len(sequence.ids),
                "finish_reason": sequence.finish.value,
                "prompt_tokens": result.prompt_tokens,
                "time_to_first_token_ms": first_ms,
                "prompt_tokens_per_second": result.prompt_tokens_per_second,
                "tokens_per_second": result.tokens_per_second,
            }
        )
        return
    sys.stdout.write("\n")
    sys.stderr.write(
        f"{result.prompt_tokens} prompt tokens at {result.prompt_tokens_per_second:.1f} tok/s, "
        f"first token after {first_ms:.0f} ms, "
        f"{len(sequence.ids)} tokens at {result.tokens_per_second:.1f} tok/s\n"
    )


def generate(
    model: ModelFolder,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", help="UTF-8 file with the text to continue; - reads stdin."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to generate at most.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all tokens.")] = 50,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that were there before less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate text and print the rates of reading and decoding."""
    text = _prompt_text(prompt, prompt_file)
    try:
        options = GenerationOptions(
            max_new_tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with quiet_libraries():
        if vision_config(model) is not None:
            raise typer.BadParameter(f"expected a language model, got the vision model {model}")
        tokenizer = load_tokenizer(model)
        ids = tokenizer.encode(text).ids
        if not ids:
            raise typer.BadParameter("prompt: expected at least one token")
        runner, eos_ids = _open_model(model)
        prompt_ids = torch.tensor([ids])
        check_vocabulary(prompt_ids, runner.vocab_size, model)
        options = replace(options, eos_ids=eos_ids)
        if not json:
            sys.stdout.write(text)
        steps = stream(runner, prompt_ids, options, tokenizer)
        for step in steps:
            if not json:
                sys.stdout.write(step.pieces[0])
                sys.stdout.flush()
    _report(text, steps.result, json)
