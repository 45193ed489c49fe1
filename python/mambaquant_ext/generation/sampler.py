"""The native sampler: logits in, tokens out."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.generation.options import GenerationOptions


class Sampler:
    """Draws the next token of each sequence of a batch, on the CPU (csrc/include/mambaquant/sampling.h).

    A seed gives the same tokens for the same logits on every instruction set and with any number of threads, and a
    sequence the same alone as in the batch's first row. Memory: 16 bytes a sequence and token of the vocabulary.
    """

    def __init__(self, batch: int, vocab_size: int, options: GenerationOptions) -> None:
        """A sampler that has seen no token.

        Args:
            batch: how many sequences.
            vocab_size: logits of each.
            options: how to choose.

        Raises:
            ValueError: batch or vocab_size below 1, or a vocabulary above 2^22.
        """
        self._native = torch.classes.mambaquant.Sampler(
            batch,
            vocab_size,
            options.temperature,
            min(options.top_k, vocab_size),
            options.top_p,
            options.repetition_penalty,
            options.seed,
        )

    def observe(self, ids: Tensor) -> None:
        """Counts the tokens of a prompt as repeated; those that are sampled count by themselves.

        Args:
            ids: (batch, n), int64.

        Raises:
            ValueError: another shape.
            TypeError: another dtype.
            IndexError: an id outside the vocabulary.
        """
        self._native.observe(ids)

    def sample(self, logits: Tensor, tokens: Tensor) -> None:
        """Chooses a token a row.

        Args:
            logits: (batch, vocab), float32, finite or -inf.
            tokens: (batch, 1), int64, written.

        Raises:
            ValueError: another shape; NaN, +inf, or nothing but -inf in a row.
            TypeError: another dtype.
        """
        self._native.sample(logits, tokens)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What `sample` would draw from; draws nothing.

        Args:
            logits: (batch, vocab), as for sample.

        Returns:
            (batch, vocab), float64.

        Raises:
            ValueError, TypeError: as sample.
        """
        weights: Tensor = self._native.weights(logits).double()
        return weights / weights.sum(-1, keepdim=True)
