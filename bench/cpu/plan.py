"""What `python -m bench.cpu` measures: sizes, prompts, batches, and what is too long or too large for whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.cpu.engines import EngineKind
from bench.shapes import LanguageShape

SCAN_COPIES = 6  # of the states of every token, float32, that an unfused scan holds at once
RATED_TOKENS = 128  # a call that reads fewer says nothing about the time of a long one


def counted(number: int, what: str) -> str:
    """1 token, 2 tokens."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Figure:
    """One thing that every engine is asked to do.

    Attributes:
        op: "prefill", from an empty state to the logits of the last token; or "decode", one token a sequence.
        size: name of a model.
        threads: to compute with.
        batch: sequences.
        tokens: that a call reads of each sequence.
    """

    op: str
    size: str
    threads: int
    batch: int
    tokens: int

    @property
    def shape(self) -> str:
        """All but op, in words."""
        length = f", {counted(self.tokens, 'token')}" if self.op == "prefill" else ""
        return f"{self.size}, {counted(self.threads, 'thread')}, batch {self.batch}{length}"

    @property
    def tokens_in_all(self) -> int:
        """Of all sequences together."""
        return self.batch * self.tokens


Samples = Mapping[
    Figure, Mapping[str, Sequence[float]]
]  # seconds per call by engine, round by round


@dataclass(frozen=True)
class Plan:
    """A preset.

    Attributes:
        sizes: names of models.
        prompts: tokens of each sequence, rising.
        prefill_batches: sequences that are read together.
        decode_batches: sequences that are decoded together.
        long_prompts: of one sequence, by ours alone, for speed and memory by length.
        starts: of each engine's process, for the time to the first token; two at least.
        seconds: that each engine may use for a figure, beyond the least number of rounds.
        minimum_rounds: samples at least.
        longest_sample_s: an engine that would need more for one sample is left out.
        has_every_thread_count: one thread and all of them, or all alone.
    """

    sizes: tuple[str, ...]
    prompts: tuple[int, ...]
    prefill_batches: tuple[int, ...]
    decode_batches: tuple[int, ...]
    long_prompts: tuple[int, ...]
    starts: int
    seconds: float
    minimum_rounds: int
    longest_sample_s: float
    has_every_thread_count: bool

    def thread_counts(self, cores: int) -> list[int]:
        """Of a machine with so many cores, of which two at most are used: most first."""
        most = min(2, cores)
        return [most, 1] if self.has_every_thread_count and most > 1 else [most]

    def groups(self, size: str, threads: int) -> Iterator[list[Figure]]:
        """Figures that are measured in turn with each other, so that their ratios hold as well."""
        for batch in self.prefill_batches:
            yield [Figure("prefill", size, threads, batch, tokens) for tokens in self.prompts]
        yield [Figure("decode", size, threads, batch, 1) for batch in self.decode_batches]


PLANS = {
    "quick": Plan(
        sizes=("mamba-130m",),
        prompts=(1, 128, 512, 8192),
        prefill_batches=(1,),
        decode_batches=(1, 8),
        long_prompts=(1024, 4096, 16384, 65536),
        starts=2,
        seconds=2.0,
        minimum_rounds=3,
        longest_sample_s=5.0,
        has_every_thread_count=False,
    ),
    "full": Plan(
        sizes=("mamba-130m", "mamba-370m", "mamba-1.4b"),
        prompts=(1, 128, 512, 2048, 8192),
        prefill_batches=(1, 4, 16),
        decode_batches=(1, 4, 8, 16),
        long_prompts=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
        starts=5,
        seconds=4.0,
        minimum_rounds=5,
        longest_sample_s=10.0,
        has_every_thread_count=True,
    ),
}


def memory_needed(kind: EngineKind, shape: LanguageShape) -> int:
    """Bytes that an engine takes to load a model, at most."""
    return int(kind.bytes_per_parameter * shape.parameters)


def why_not(
    figure: Figure,
    kind: EngineKind,
    shape: LanguageShape,
    available_bytes: int,
    known: dict[int, float],
    longest_sample_s: float,
) -> str | None:
    """Why an engine is not asked for a figure, or None.

    Args:
        figure: to measure.
        kind: of the engine.
        shape: of its model.
        available_bytes: of memory, with the models loaded.
        known: seconds of this engine's calls by the tokens that they read, of the same model and threads.
        longest_sample_s: of the plan.
    """
    if figure.op == "decode":
        return None
    states = 4 * figure.tokens_in_all * shape.layer.dim * shape.layer.dstate
    if kind.is_unfused and SCAN_COPIES * states > available_bytes:
        return f"its scan would hold {SCAN_COPIES * states >> 20:,} MiB"
    rated = [tokens for tokens in known if RATED_TOKENS <= tokens <= figure.tokens_in_all]
    if rated:
        expected = known[max(rated)] * figure.tokens_in_all / max(rated)
        if expected > longest_sample_s:
            return f"a sample would take {expected:.0f} s"
    return None
