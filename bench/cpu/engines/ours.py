"""The quantized model on our own kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bench.cpu.engines.engine import PROMPT
from bench.cpu.models.token_ids import token_ids
from mambaquant_ext import current_isa, load_runner
from mambaquant_ext.run.runner import LanguageRunner, RunnerState

EMBEDDING = ("embedding", "embedding_scale")


class OurEngine:
    """A LanguageRunner, and a state for each batch size."""

    def __init__(self, runner: LanguageRunner) -> None:
        """A runner on the threads that are set."""
        self._runner = runner
        self._states: dict[int, RunnerState] = {}
        self._logits: dict[int, Tensor] = {}
        self.settings = f"LanguageRunner, {current_isa()}"

    def prompts(self, batch: int, tokens: int) -> Tensor:
        """(batch, tokens) ids."""
        return torch.from_numpy(token_ids(self._runner.vocab_size, batch, tokens))

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last tokens, from a state that is set back."""
        if len(ids) not in self._states:
            self._states[len(ids)] = self._runner.new_state(len(ids))
        state = self._states[len(ids)]
        state.reset()
        return self._runner.forward(ids, state)

    def start(self, batch: int) -> tuple[Tensor, RunnerState]:
        """The next ids, and the state behind a prompt."""
        state = self._runner.new_state(batch)
        self._runner.forward(self.prompts(batch, PROMPT), state)
        return self.prompts(batch, 1), state

    def step(self, sequences: tuple[Tensor, RunnerState]) -> Tensor:
        """Logits of one more token, written over those before as a generation does; the state goes on."""
        ids, state = sequences
        if len(ids) not in self._logits:
            self._logits[len(ids)] = torch.empty(len(ids), self._runner.vocab_size)
        return self._runner.forward(ids, state, self._logits[len(ids)])

    def decoded_bytes(self) -> int:
        """What a token reads of the model: every packed weight, scale and constant, and one row of the embedding."""
        tensors = self._runner.blocks.tensors()
        sizes = {name: tensor.nbytes for name, tensor in tensors.items() if tensor is not None}
        for name in EMBEDDING:
            sizes[name] //= self._runner.vocab_size
        return sum(sizes.values())


def load(_variant: str, folder: Path, threads: int) -> OurEngine:
    """The quantized model of a folder."""
    torch.set_num_threads(threads)
    return OurEngine(load_runner(folder))
