"""Text files as windows of tokens, with the tokenizer of a model folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mambaquant_ext.cli.sampling import pick
from mambaquant_ext.evaluate import Evaluation, evaluate, windows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """See mambaquant_ext.cli.data.Data.

    Attributes:
        path: where from.
        folder: of the model whose tokenizer made the tokens.
        windows: (count, window), int64.
        bytes_per_token: of the whole text.
    """

    unit: ClassVar[str] = "window"
    path: Path
    folder: Path
    windows: Tensor
    bytes_per_token: float

    @classmethod
    def open(cls, path: Path, folder: Path, window: int, limit: int | None = None) -> Text:
        """Tokenises a text.

        Args:
            path: of the text.
            folder: of the model.
            window: tokens per window.
            limit: keep only so many windows from the start; None for all.

        Raises:
            ValueError: no readable tokenizer, not UTF-8, or shorter than one window.
            ImportError: the tokenizers library is not installed.
        """
        all_windows, bytes_per_token = token_windows(path, load_tokenizer(folder), window)
        return cls(
            path=path,
            folder=folder,
            windows=all_windows[:limit],
            bytes_per_token=bytes_per_token,
        )

    def __len__(self) -> int:
        """How many windows."""
        return len(self.windows)

    @property
    def title(self) -> str:
        """See Data."""
        return f"{self.path.name}, {self.pieces(len(self))}"

    def pieces(self, count: int) -> str:
        """See Data."""
        return f"{count} windows of {self.windows.shape[1]} tokens"

    def batches(self, model: Any, count: int, size: int, seed: int) -> list[Tensor]:
        """See Data."""
        chosen = pick(self.windows, count, seed)
        check_vocabulary(chosen, model.config.vocab_size, self.folder)
        return list(chosen.split(size))

    def score(self, model: Any, batch: int, progress: Callable[[int], None]) -> Evaluation:
        """See Data."""
        check_vocabulary(self.windows, model.config.vocab_size, self.folder)
        return evaluate(
            lambda ids: model(ids, use_cache=False).logits,
            self.windows,
            self.bytes_per_token,
            batch,
            progress,
        )

    def figures(self, score: Evaluation, _reference: Evaluation | None) -> dict[str, Any]:
        """See Data."""
        return score.to_dict()

    def cells(self, figures: dict[str, Any]) -> dict[str, str]:
        """See Data."""
        return {
            "perplexity": f"{figures['perplexity']:.3f}",
            "bits per byte": f"{figures['bits_per_byte']:.4f}",
            "tok/s": f"{figures['tokens_per_second']:,.0f}",
        }


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, a tokenizers.Tokenizer.

    Raises:
        ValueError: the folder has no readable tokenizer.json.
        ImportError: the tokenizers library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            "this needs the tokenizers library: pip install 'mambaquant_ext[hf]'"
        ) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; expected the model's tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path}: cannot be read: {error}") from None


def read_text(path: Path) -> str:
    """A UTF-8 text, newlines as they are.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None


def read_stdin() -> str:
    """All of stdin as a UTF-8 text, newlines as they are.

    Raises:
        ValueError: not UTF-8, or closed.
    """
    if sys.stdin is None:
        raise ValueError("stdin: expected a text, it is closed")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: expected UTF-8 text ({error})") from None


def token_windows(path: Path, tokenizer: Any, window: int) -> tuple[Tensor, float]:
    """Tokenises a whole file at once and cuts it into windows.

    Args:
        path: of the text.
        tokenizer: from load_tokenizer.
        window: tokens per window.

    Returns:
        (count, window) int64, and the file's bytes per token.

    Raises:
        ValueError: not UTF-8, or shorter than one window.
    """
    text = read_text(path)
    ids = tokenizer.encode(text).ids
    try:
        return windows(ids, window), len(text.encode()) / max(len(ids), 1)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_vocabulary(ids: Tensor, vocab_size: int, folder: Path) -> None:
    """The tokenizer of a folder belongs to its model.

    Args:
        ids: that the tokenizer made, any shape, not empty.
        vocab_size: of the model.
        folder: of the tokenizer.

    Raises:
        ValueError: an id outside the model's vocabulary.
    """
    if int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: expected token ids below {vocab_size}, the model's vocabulary, got "
            f"{int(ids.max())}; is it another model's tokenizer?"
        )
