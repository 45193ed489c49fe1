"""A model of transformers, float or quantized, behind the contract of the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class ModuleState:
    """What a model keeps between tokens.

    Attributes:
        cache: transformers' own; None at the start of a sequence.
    """

    cache: Any = None


class ModuleRunner:
    """Reads tokens with a model's own modules: for what run.LanguageRunner does not take."""

    def __init__(self, model: Any) -> None:
        """Keeps the model.

        Args:
            model: a language model of transformers, or one from `quantize_` or `load`, on the CPU.
        """
        self.vocab_size: int = model.config.vocab_size
        self._model = model

    def new_state(self, batch: int = 1) -> ModuleState:
        """The state of sequences that have no token yet."""
        return ModuleState()

    @torch.no_grad()
    def forward(self, ids: Tensor, state: ModuleState, out: Tensor | None = None) -> Tensor:
        """Reads tokens; allocates its result.

        Args:
            ids: (batch, seqlen), int64.
            state: advanced in place.
            out: not used.

        Returns:
            (batch, vocab), float32, of the last token.
        """
        # Of several tokens behind others, transformers' float model forgets what its convolutions have read.
        for part in [ids] if state.cache is None else ids.split(1, 1):
            result = self._model(part, cache_params=state.cache, use_cache=True, logits_to_keep=1)
            state.cache = result.cache_params
        logits: Tensor = result.logits[:, -1].float()
        return logits
