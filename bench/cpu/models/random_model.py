"""Language models with random weights, and the prompts that they are calibrated and checked with."""

from __future__ import annotations

import copy
from typing import Any

import torch

from bench.cpu.models.gguf import NORM_EPS
from bench.cpu.models.token_ids import token_ids
from bench.shapes import LanguageShape
from mambaquant_ext.model.checkpoint import skeleton
from mambaquant_ext.model.hf import import_transformers
from mambaquant_ext.transform.rotate import SAMPLES_PER_CHANNEL

SEED = 0
BLOCKS = "backbone.layers."
WINDOW = 128  # tokens that are calibrated on at once
# transformers' own initial weights make a model that doubles any rounding in each layer, so that no two engines
# agree on its logits. These, like trained weights, do not: the table outweighs what the layers add to it.
WEIGHT_STD, EMBEDDING_STD = 0.02, 0.3


def random_model(shape: LanguageShape) -> Any:
    """A transformers.MambaForCausalLM in float32 with random weights, the same ones at every call."""
    transformers = import_transformers()
    layer = shape.layer
    torch.manual_seed(SEED)
    config = transformers.MambaConfig(
        vocab_size=shape.vocab,
        hidden_size=layer.hidden,
        num_hidden_layers=shape.layers,
        state_size=layer.dstate,
        time_step_rank=layer.dt_rank,
        conv_kernel=layer.width,
        initializer_range=WEIGHT_STD,
        layer_norm_epsilon=NORM_EPS,
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(EMBEDDING_STD / WEIGHT_STD)
    return model


def deepened(model: Any, layers: int) -> Any:
    """A model of so many layers, which are the given model's over and over, each with weights of its own in memory."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    deep = skeleton(config)
    few, state = len(model.backbone.layers), model.state_dict()
    whole = {}
    for name in deep.state_dict():
        source = name
        if name.startswith(BLOCKS):
            index, _, rest = name.removeprefix(BLOCKS).partition(".")
            source = f"{BLOCKS}{int(index) % few}.{rest}"
        whole[name] = state[source].clone()
    deep.load_state_dict(whole, assign=True)
    deep.tie_weights()
    return deep.eval()


def prompts(shape: LanguageShape, batch: int, tokens: int) -> torch.Tensor:
    """(batch, tokens) int64 ids."""
    return torch.from_numpy(token_ids(shape.vocab, batch, tokens))


def calibration(shape: LanguageShape) -> torch.Tensor:
    """Prompts, as few as the recipe's KLT rotations take, of dt and, over all layers, of the residual stream."""
    rows = max(shape.layer.dt_rank, -(-shape.layer.hidden // shape.layers))
    return prompts(shape, -(-SAMPLES_PER_CHANNEL * rows // WINDOW), WINDOW)
