"""Random prompts, the same for every engine. Without torch, which a process of llama.cpp does not load."""

from __future__ import annotations

from typing import Any

import numpy as np

SEED = 0


def token_ids(vocab: int, batch: int, tokens: int) -> np.ndarray[Any, Any]:
    """(batch, tokens) int64 ids, the same ones at every call."""
    return np.random.default_rng(SEED).integers(0, vocab, (batch, tokens))
