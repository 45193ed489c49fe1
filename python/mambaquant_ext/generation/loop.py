"""The loop: read the prompts, then draw a token, hand out its text, read it, and so on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from mambaquant_ext.generation.options import FinishReason, GenerationOptions
from mambaquant_ext.generation.result import GeneratedSequence, Generation, Step
from mambaquant_ext.generation.sampler import Sampler
from mambaquant_ext.generation.text import IncrementalDecoder, StopFilter, Tokenizer

State = TypeVar("State")
Prompts: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]


class Runner(Protocol[State]):
    """What the loop needs of a language model; run.LanguageRunner has it."""

    vocab_size: int

    def new_state(self, batch: int = 1) -> State:
        """The state of sequences that have no token yet."""
        ...

    def forward(self, ids: Tensor, state: State, out: Tensor | None = None) -> Tensor:
        """Reads tokens and says what may come next.

        Args:
            ids: (batch, seqlen), int64.
            state: of the tokens before; advanced in place.
            out: (batch, vocab), the result of an earlier call, which may be written again.

        Returns:
            (batch, vocab), float32: the logits behind the last token.
        """
        ...


class TokenStream(Generic[State]):
    """An iterator over the steps of a generation.

    Each step reads the tokens before it, draws one token a sequence and decodes them. It may be left at any step, and
    continued later.
    """

    def __init__(
        self,
        runner: Runner[State],
        ids: Prompts,
        options: GenerationOptions,
        tokenizer: Tokenizer | None = None,
        state: State | None = None,
    ) -> None:
        """See `stream`, which makes one."""
        if options.stop and tokenizer is None:
            raise ValueError("stop: expected a tokenizer, in whose text the strings are looked for")
        prompts = _as_batch(ids)
        self._runner, self._options = runner, options
        self._state = runner.new_state(len(prompts)) if state is None else state
        self._sampler = Sampler(len(prompts), runner.vocab_size, options)
        self._sampler.observe(prompts)
        self._sequences = [_Sequence(p, options, tokenizer) for p in prompts.tolist()]
        self._unread, self._prompt_tokens = prompts, prompts.numel()
        self._tokens = prompts.new_empty(len(prompts), 1)
        self._logits: Tensor | None = None
        self._step_seconds: list[float] = []

    def __iter__(self) -> Iterator[Step]:
        """Itself."""
        return self

    def __next__(self) -> Step:
        """The next step; StopIteration when every sequence has ended."""
        if all(sequence.finish is not None for sequence in self._sequences):
            raise StopIteration
        start = time.perf_counter()
        self._logits = self._runner.forward(self._unread, self._state, self._logits)
        self._sampler.sample(self._logits, self._tokens)
        self._unread = self._tokens
        drawn = self._tokens.flatten().tolist()
        taken = [s.take(token) for s, token in zip(self._sequences, drawn, strict=True)]
        tokens, pieces = zip(*taken, strict=True)
        self._step_seconds.append(time.perf_counter() - start)
        return Step(tokens, pieces)

    @property
    def result(self) -> Generation:
        """What has been generated so far."""
        lengths = {len(sequence.ids) for sequence in self._sequences}
        return Generation(
            sequences=tuple(sequence.result() for sequence in self._sequences),
            prompt_tokens=self._prompt_tokens,
            time_to_first_token=sum(self._step_seconds[:1]),
            decode_seconds=sum(self._step_seconds[1:]),
            unread=self._unread.clone() if len(lengths) == 1 else None,
        )


class _Sequence:
    """One sequence of the batch: its tokens, its text, and whether it has ended."""

    def __init__(
        self, prompt: list[int], options: GenerationOptions, tokenizer: Tokenizer | None
    ) -> None:
        self.ids: list[int] = []
        self.finish: FinishReason | None = None
        self._options = options
        self._pieces: list[str] = []
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, prompt)
        self._filter = StopFilter(options.stop)

    def take(self, token: int) -> tuple[int | None, str]:
        """The token and the text that it lets out; (None, "") behind the end."""
        if self.finish is not None:
            return None, ""
        self.ids.append(token)
        if token in self._options.eos_ids:
            self.finish = FinishReason.EOS
        elif len(self.ids) == self._options.max_new_tokens:
            self.finish = FinishReason.LENGTH
        piece = "" if self._decoder is None else self._text_of(token, self._decoder)
        self._pieces.append(piece)
        return token, piece

    def _text_of(self, token: int, decoder: IncrementalDecoder) -> str:
        text = decoder.push(token)
        if self.finish is not None:
            text += decoder.finish()
        piece = self._filter.push(text)
        if self._filter.stopped:
            self.finish = FinishReason.STOP
        return piece if self.finish is None else piece + self._filter.finish()

    def result(self) -> GeneratedSequence:
        return GeneratedSequence(
            ids=tuple(self.ids), text="".join(self._pieces), finish=self.finish
        )


def _as_batch(ids: Any) -> Tensor:
    """(batch, seqlen) int64, of one prompt or several."""
    if isinstance(ids, Tensor):
        prompts = ids if ids.dim() > 1 else ids[None]
    else:
        rows = ids if len(ids) > 0 and isinstance(ids[0], Sequence) else [ids]
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"ids: expected prompts of one length, got {sorted(lengths)} tokens")
        prompts = torch.tensor([list(row) for row in rows], dtype=torch.int64, device="cpu")
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise ValueError(
            f"ids: expected (batch, seqlen) with at least one token each, got shape {tuple(prompts.shape)}"
        )
    return prompts


def stream(
    runner: Runner[State],
    ids: Prompts,
    options: GenerationOptions,
    tokenizer: Tokenizer | None = None,
    state: State | None = None,
) -> TokenStream[State]:
    """Generates step by step: an iterator over tokens and pieces of text.

    Args:
        runner: of the model.
        ids: a prompt, or (batch, seqlen) prompts of one length: int64, or lists of tokens.
        options: how to choose tokens and when to end.
        tokenizer: for text and stop strings; None for tokens alone.
        state: to go on from, as an earlier generation left it, advanced in place; None to start anew. The repetition
            penalty counts the tokens of this call.

    Returns:
        An iterator, whose `result` has what was generated so far.

    Raises:
        ValueError: no token, prompts of several lengths, or stop strings without a tokenizer.
        TypeError: ids of another dtype.
        IndexError: an id outside the vocabulary.
    """
    return TokenStream(runner, ids, options, tokenizer, state)


def generate(
    runner: Runner[State],
    ids: Prompts,
    options: GenerationOptions,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[Step], None] | None = None,
    state: State | None = None,
) -> Generation:
    """Generates to the end.

    Args:
        runner: of the model.
        ids: see stream.
        options: see stream.
        tokenizer: see stream.
        on_token: called with each step as it comes.
        state: see stream.

    Returns:
        Tokens, text, why each sequence ended, and how long it took.

    Raises:
        ValueError: as stream; or a model that gives NaN.
        TypeError: as stream.
        IndexError: as stream.
    """
    steps = stream(runner, ids, options, tokenizer, state)
    for step in steps:
        if on_token is not None:
            on_token(step)
    return steps.result
