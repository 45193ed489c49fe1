"""How text is generated: every choice in one validated dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a sequence ended.

    LENGTH: it has max_new_tokens. EOS: its last token is one of eos_ids. STOP: its text reached a stop string.
    """

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """The default is greedy decoding. Penalty, temperature, top_k and top_p apply in this order, as in transformers.

    Attributes:
        max_new_tokens: tokens a sequence at most.
        temperature: divides the logits; 0 takes the likeliest token, whatever top_k, top_p and seed are.
        top_k: draw from the so many likeliest tokens, and those that equal the last of them; 0: from all.
        top_p: draw from the likeliest tokens that together have this probability; 1: from all.
        repetition_penalty: divides positive and multiplies negative logits of the tokens that the prompt or the
            sequence has already; 1: none.
        stop: strings that end a sequence; the text ends before the first of them.
        eos_ids: tokens that end a sequence.
        seed: of the draws; any int of 64 bits.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ValueError: a value out of its range.
            TypeError: a single string as `stop`.
        """
        if isinstance(self.stop, str):
            raise TypeError(f"stop: expected a tuple of strings, got the string {self.stop!r}")
        for name, expected, fits in (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("temperature", "finite and at least 0", 0 <= self.temperature < math.inf),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "finite and above 0", 0 < self.repetition_penalty < math.inf),
            ("stop", "strings that are not empty", all(self.stop)),
            ("eos_ids", "at least 0 each", all(token >= 0 for token in self.eos_ids)),
            ("seed", "an int of 64 bits", -(2**63) <= self.seed < 2**63),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
