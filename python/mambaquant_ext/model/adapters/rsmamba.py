"""RSMamba: one set of weights along up to three walks, merged by a gate or a mean."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import Merge, Skip
from mambaquant_ext.model.adapters.configured import ConfiguredAdapter
from mambaquant_ext.model.hf import mixer_weights
from mambaquant_ext.model.reading import copied
from mambaquant_ext.model.sites import BlockSite, TokenSequence
from mambaquant_ext.model.vision.rsmamba import RSMamba, RSMambaConfig, RSMambaLayer
from mambaquant_ext.model.weights import MixerWeights
from mambaquant_ext.routes import FORWARD, ScanRoute


class RSMambaAdapter(ConfiguredAdapter):
    """RSMamba with any of its path types.

    All layers share one norm in front of them, which is no part of a block, and the skips are around norm and block:
    the stream stays as it is, and a block rotates its own input.
    """

    name = "rsmamba"
    head = "head.fc"
    model_class = RSMamba
    config_class = RSMambaConfig

    def sites(self, model: nn.Module) -> list[BlockSite]:
        """See Adapter."""
        assert isinstance(model, RSMamba)
        return [_site(model, index) for index in range(model.config.depth)]


def _site(model: RSMamba, index: int) -> BlockSite:
    layer = model.backbone.layers[index]
    assert isinstance(layer, RSMambaLayer)
    gate = None
    if model.config.path_type.is_gated:
        gate = model.backbone.gate_layers[index].get_submodule("0")
    weights = partial(rsmamba_layer_weights, layer, gate)
    return BlockSite(f"backbone.layers.{index}", TokenSequence(), weights)


def rsmamba_layer_weights(layer: RSMambaLayer, gate: nn.Module | None) -> MixerWeights:
    """The weights of a layer and of its merge.

    Args:
        layer: float.
        gate: the linear layer (paths * hidden) -> (paths), or None for a mean.

    Raises:
        ValueError: a gate that sees a bias of out_proj.
    """
    if gate is not None and layer.out_proj.bias is not None:
        raise ValueError("expected no bias of out_proj with gated paths, got one")
    weights = mixer_weights(layer, None)
    shuffled = layer.config.shuffle(layer.index)
    paths = layer.config.path_type.paths
    routes = (FORWARD, ScanRoute(reverse=True), ScanRoute(shuffled))[:paths]
    weights = weights.replace(routes=routes, skip=Skip.NONE)
    if gate is None:
        return weights.replace(out=weights.out.double() / paths)
    assert isinstance(gate, nn.Linear)
    return weights.replace(merge=Merge.GATED, merge_gate=_merge_gate(gate.weight, weights.out))


def _merge_gate(gate: Tensor, out: Tensor) -> Tensor:
    """The gate's logits as functions of what out_proj takes, rather than of what it gives.

    Args:
        gate: (paths, paths * hidden), of the token means of out_proj's results.
        out: (hidden, dim), float32.

    Returns:
        (paths, paths, dim), float64.
    """
    blocks = copied(gate).double().unflatten(1, (len(gate), len(out)))
    return torch.matmul(blocks, out.double())
