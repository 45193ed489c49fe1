"""Text files as token windows, with the tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext.evaluate import windows


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


def pick_windows(all_windows: Tensor, count: int, seed: int) -> Tensor:
    """`count` windows drawn without replacement, or all of them if there are fewer; in file order."""
    if count >= len(all_windows):
        return all_windows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(all_windows), generator=generator)[:count]
    return all_windows[chosen.sort().values]
