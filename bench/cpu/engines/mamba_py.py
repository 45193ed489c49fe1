"""mambapy (mamba.py): the blocks in plain torch with a parallel scan, between transformers' embedding and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mambapy.mamba import Mamba, MambaConfig
from torch import Tensor

from bench.cpu.engines.engine import PROMPT
from bench.cpu.models.token_ids import token_ids
from mambaquant_ext.model.checkpoint import load_float_model

BLOCKS = "backbone.layers."


class MambaPyEngine:
    """The parallel scan reads prompts, step() decodes. mambapy's own language model imports a GPU package."""

    settings = "parallel scan, inference_mode, logits of the last token"

    def __init__(self, model: Any) -> None:
        """Takes the blocks and ends of a transformers model in float32."""
        config = model.config
        self._ends = model
        self._config = MambaConfig(
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            dt_rank=config.time_step_rank,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            rms_norm_eps=config.layer_norm_epsilon,
        )
        with torch.device("meta"):
            self._blocks = Mamba(self._config)
        state = {
            name.replace(BLOCKS, "layers."): tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(BLOCKS)
        }
        self._blocks.load_state_dict(state, assign=True)

    def prompts(self, batch: int, tokens: int) -> Tensor:
        """(batch, tokens) ids."""
        return torch.from_numpy(token_ids(self._ends.config.vocab_size, batch, tokens))

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last tokens. mambapy returns no state that could go on from there."""
        return self._logits(self._blocks(self._ends.backbone.embeddings(ids))[:, -1])

    @torch.inference_mode()
    def start(self, batch: int) -> list[Any]:
        """The next ids and the caches, behind a prompt that is read token by token: there is no other way."""
        config = self._config
        conv = torch.zeros(batch, config.d_inner, config.d_conv - 1)
        caches = [(None, conv.clone()) for _ in range(config.n_layers)]
        sequences: list[Any] = [self.prompts(batch, 1)[:, 0], caches]
        for _ in range(PROMPT):
            self.step(sequences)
        return sequences

    @torch.inference_mode()
    def step(self, sequences: list[Any]) -> Tensor:
        """Logits of one more token; the caches go on."""
        ids, caches = sequences
        hidden, sequences[1] = self._blocks.step(self._ends.backbone.embeddings(ids), caches)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._ends.lm_head(self._ends.backbone.norm_f(hidden))


def load(_variant: str, folder: Path, threads: int) -> MambaPyEngine:
    """The float model of a folder, in float32."""
    torch.set_num_threads(threads)
    return MambaPyEngine(load_float_model(folder))
