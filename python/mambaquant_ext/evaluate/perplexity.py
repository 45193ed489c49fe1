"""Perplexity of a language model on text, by the protocol of non-overlapping windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        nll: mean negative log-likelihood per predicted token, nats.
        perplexity: exp(nll).
        bits_per_byte: nll in bits, times tokens over bytes of the text.
        predicted_tokens: how many tokens were predicted.
        tokens_per_second: tokens read per second of forward passes.
    """

    nll: float
    perplexity: float
    bits_per_byte: float
    predicted_tokens: int
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def windows(ids: list[int], window: int) -> Tensor:
    """Cuts token ids into non-overlapping windows and drops the incomplete last one.

    Args:
        ids: of the whole text.
        window: tokens per window, at least 2.

    Returns:
        (count, window), int64.

    Raises:
        ValueError: fewer tokens than one window.
    """
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    count = len(ids) // window
    if count == 0:
        raise ValueError(
            f"text: expected at least one window of {window} tokens, got {len(ids)} tokens"
        )
    return torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)


@torch.no_grad()
def evaluate(
    logits: Callable[[Tensor], Tensor],
    token_windows: Tensor,
    bytes_per_token: float,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda _done: None,
) -> Evaluation:
    """Mean NLL over tokens 2 to the last of every window; each window starts from a zero state.

    Args:
        logits: (batch, seqlen) int64 -> (batch, seqlen, vocab).
        token_windows: (count, window), int64, see `windows`.
        bytes_per_token: bytes of the whole text over its tokens.
        batch_size: windows per forward pass.
        progress: called with the number of windows done.

    Returns:
        The figures.
    """
    total, seconds = 0.0, 0.0
    for start in range(0, len(token_windows), batch_size):
        batch = token_windows[start : start + batch_size]
        begin = time.perf_counter()
        scores = logits(batch)
        seconds += time.perf_counter() - begin
        loss = F.cross_entropy(
            scores[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss.double())
        progress(start + len(batch))
    predicted = token_windows[:, 1:].numel()
    nll = total / predicted
    return Evaluation(
        nll=nll,
        perplexity=math.exp(nll),
        bits_per_byte=nll / math.log(2) / bytes_per_token,
        predicted_tokens=predicted,
        tokens_per_second=token_windows.numel() / seconds,
    )
