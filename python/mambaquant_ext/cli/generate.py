"""`mambaquant generate`: text from a quantized (or float) model, streamed."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import torch
import typer

from mambaquant_ext.checkpoint import load
from mambaquant_ext.cli.console import print_json, quiet_libraries
from mambaquant_ext.cli.models import is_quantized
from mambaquant_ext.cli.options import ModelFolder
from mambaquant_ext.cli.text import check_vocabulary, load_tokenizer
from mambaquant_ext.model.checkpoint import load_float_model, vision_config


class TextStream:
    """A transformers streamer that decodes as tokens come and notes when they came."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, echo: bool) -> None:
        """Starts the clock."""
        self.tokenizer, self.prompt_tokens, self.echo = tokenizer, prompt_tokens, echo
        self.ids: list[int] = []
        self.text = ""
        self.start = self.first = self.last = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then one token at a time."""
        ids = value.flatten().tolist()
        if self.prompt_tokens:
            self.prompt_tokens = 0
            return
        self.last = time.perf_counter()
        self.first = self.first if self.ids else self.last
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):  # the middle of a character of several tokens
            return
        if self.echo:
            sys.stdout.write(text[len(self.text) :])
            sys.stdout.flush()
        self.text = text

    def end(self) -> None:
        """Called after the last token."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate, after the first token."""
        return (len(self.ids) - 1) / max(self.last - self.first, 1e-9) if len(self.ids) > 1 else 0.0


def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to generate at most.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate text and print the decoding rate."""
    with quiet_libraries():
        if vision_config(model) is not None:
            raise typer.BadParameter(f"expected a language model, got the vision model {model}")
        tokenizer = load_tokenizer(model)
        ids = tokenizer.encode(prompt).ids
        if not ids:
            raise typer.BadParameter("expected at least one token", param_hint="--prompt")
        runner = load(model) if is_quantized(model) else load_float_model(model)
        input_ids = torch.tensor([ids])
        check_vocabulary(input_ids, runner.config.vocab_size, model)
        torch.manual_seed(seed)
        stream = TextStream(tokenizer, len(ids), echo=not json)
        if not json:
            sys.stdout.write(prompt)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
        runner.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            streamer=stream,
            **sampling,
        )
    first_ms = (stream.first - stream.start) * 1e3
    if json:
        print_json(
            {
                "prompt": prompt,
                "text": stream.text,
                "tokens": len(stream.ids),
                "time_to_first_token_ms": first_ms,
                "tokens_per_second": stream.tokens_per_second,
            }
        )
    else:
        sys.stdout.write("\n")
        sys.stderr.write(
            f"{len(ids)} prompt tokens, first token after {first_ms:.0f} ms, "
            f"{len(stream.ids)} tokens at {stream.tokens_per_second:.1f} tok/s\n"
        )
