"""Text out of a growing sequence of tokens: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or not yet
# An unfinished character has three bytes at most, and bytes have a replacement character each at most.
_UNFINISHED = 3
# Tokens that are decoded with each new one: at most _LONGEST, and mostly not more than _LONG.
_LONG = 16
_LONGEST = 32
_CONTEXT = 8


class Tokenizer(Protocol):
    """What generation needs of a tokenizer: those of tokenizers and of transformers fit."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens.

        Args:
            ids: the tokens.
            skip_special_tokens: whether those that are no text are left out.
        """
        ...


class IncrementalDecoder:
    """Decodes a sequence token by token, each in constant time.

    A window of the last tokens is decoded with each new one, since a token's text depends on its neighbours: bytes
    of one character may lie in several, and some tokenizers drop a space at the start. A window that is long loses
    its first tokens, up to a place where a character ended and behind which there is text. How much of its text has
    been given out is counted from the end, where the shorter window has the same text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """Starts behind a prompt.

        Args:
            tokenizer: of the tokens.
            prompt: tokens before, whose text is not given out.
        """
        self._tokenizer = tokenizer
        ends = [list(prompt[-length:]) for length in range(_LONG, _LONG - 4, -1)]
        # One of four ends of the prompt begins where a character does.
        self._window = min(ends, key=lambda end: self._decode(end).count(REPLACEMENT))
        self._text = self._decode(self._window)
        self._given = len(self._text.rstrip(REPLACEMENT))
        self._boundary = 0  # in the window: behind the last token that ended a character

    def push(self, token: int) -> str:
        """The text that a token completes: often a word, "" within a character.

        Args:
            token: the next one.
        """
        self._window.append(token)
        self._text = self._decode(self._window)
        piece = self._give(len(self._text.rstrip(REPLACEMENT)))
        if piece and self._given == len(self._text):
            if len(self._window) > _LONG:
                self._drop(self._boundary)
            self._boundary = len(self._window)
        elif (
            len(self._window) > _LONGEST
        ):  # what has been no character for so long never will be one
            piece += self._give(len(self._text) - _UNFINISHED)
            self._drop(len(self._window) - _CONTEXT)
            self._boundary = 0
        return piece

    def finish(self) -> str:
        """The rest: an unfinished character as a replacement character."""
        return self._give(len(self._text))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _drop(self, count: int) -> None:
        held = len(self._text) - self._given
        del self._window[:count]
        self._text = self._decode(self._window)
        self._given = max(len(self._text) - held, 0)

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


class StopFilter:
    """Lets text through up to the first stop string, however it is cut into pieces.

    Of several stop strings the one counts that is complete first; of those, the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Nothing read yet.

        Args:
            stop: the strings, none of them empty.
        """
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What may be given out of all that came; what may still become a stop string is held back.

        Args:
            piece: the text that follows; ignored behind a stop string.
        """
        if self.stopped or not self._stop:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        safe = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What is held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and is longer than."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
