"""transformers' language model: in float, with linear layers in torch.ao's dynamic int8, and with our blocks."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cpu.engines.engine import PROMPT
from bench.cpu.models.token_ids import token_ids
from mambaquant_ext import load as load_quantized
from mambaquant_ext.model.checkpoint import load_float_model
from mambaquant_ext.model.hf import import_transformers

import_transformers().MambaForCausalLM  # noqa: B018, imported when it is asked for: here, not while a model loads

SETTINGS = "inference_mode, logits of the last token, eager"
VERIFY = {"w8a8": None, "w8a8, verified": True, "w8a8, unverified": False}


class TorchEngine:
    """A model called as transformers' generate() calls it."""

    def __init__(self, model: Any, settings: str) -> None:
        """The model in eval mode, and what was chosen for it."""
        self._model, self.settings = model, settings

    def prompts(self, batch: int, tokens: int) -> Tensor:
        """(batch, tokens) ids."""
        return torch.from_numpy(token_ids(self._model.config.vocab_size, batch, tokens))

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last tokens; the state is made as decoding would need it."""
        return self._model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    @torch.inference_mode()
    def start(self, batch: int) -> tuple[Tensor, Any]:
        """The next ids, and the cache behind a prompt."""
        cache = self._model(self.prompts(batch, PROMPT), use_cache=True).cache_params
        return self.prompts(batch, 1), cache

    @torch.inference_mode()
    def step(self, sequences: tuple[Tensor, Any]) -> Tensor:
        """Logits of one more token; the cache goes on."""
        ids, cache = sequences
        return self._model(ids, use_cache=True, cache_params=cache).logits[:, -1]


class _Head(nn.Module):
    """A dynamically quantized head; transformers asks a head for the dtype of its weight."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.weight = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _dynamic_int8(model: Any) -> Any:
    """Every linear layer but dt_proj, whose weight transformers multiplies by itself."""
    from torch.ao import quantization

    wanted = {
        name: quantization.default_dynamic_qconfig
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("dt_proj")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's announcement of its successor
        model = quantization.quantize_dynamic(model, wanted, dtype=torch.qint8, inplace=True)
    model.lm_head = _Head(model.lm_head)
    return model


def load(variant: str, folder: Path, threads: int) -> TorchEngine:
    """The float model of a folder as "float32", "bfloat16" or "dynamic int8"; the quantized one as VERIFY says."""
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if variant in VERIFY:
        return TorchEngine(load_quantized(folder, verify=VERIFY[variant]), SETTINGS)
    model = load_float_model(folder, torch.bfloat16 if variant == "bfloat16" else torch.float32)
    if variant == "dynamic int8":
        model = _dynamic_int8(model)
    return TorchEngine(model, SETTINGS)
