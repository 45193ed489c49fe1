"""What a generation gives: step by step, and in the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mambaquant_ext.generation.options import FinishReason


@dataclass(frozen=True, slots=True)
class Step:
    """What one round gave to each sequence of the batch.

    Attributes:
        tokens: None for a sequence that had ended before.
        pieces: text, often a word; "" within a character, or while the text may become a stop string.
    """

    tokens: tuple[int | None, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSequence:
    """What one prompt was continued with.

    Attributes:
        ids: an EOS token and those of a stop string included.
        text: up to the stop string; special tokens have none; "" without a tokenizer.
        finish: why it ended, or None where it has not.
    """

    ids: tuple[int, ...]
    text: str
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generation:
    """What a generation came to.

    Attributes:
        sequences: one for each prompt.
        prompt_tokens: of all prompts together.
        time_to_first_token: seconds to read the prompts and draw the first token of each.
        decode_seconds: from there to the last token. Time that the caller spends between steps is in neither.
        unread: (batch, 1), int64, the last tokens. The state has not read them, so that the next prompt that goes on
            from it begins with them. None where the sequences ended at different lengths: the state of the shorter
            ones has read on.
    """

    sequences: tuple[GeneratedSequence, ...]
    prompt_tokens: int
    time_to_first_token: float
    decode_seconds: float
    unread: Tensor | None = field(repr=False)

    @property
    def tokens(self) -> int:
        """Generated tokens of all sequences together."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Rate of reading the prompts, of all sequences together."""
        return self.prompt_tokens / max(self.time_to_first_token, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate of all sequences together, without each one's first token; 0 if there are no others."""
        decoded = sum(max(len(sequence.ids) - 1, 0) for sequence in self.sequences)
        return decoded / max(self.decode_seconds, 1e-9)
