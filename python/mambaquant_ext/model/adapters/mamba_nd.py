"""Mamba-ND: one walk a layer, whose order and direction change from layer to layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import Skip, StreamWrite
from mambaquant_ext.config import Rotation
from mambaquant_ext.model.adapters.configured import ConfiguredAdapter
from mambaquant_ext.model.adapters.streams import rotate_rows_, rotate_token_, rotation_behind
from mambaquant_ext.model.hf import mixer_weights
from mambaquant_ext.model.reading import norm_weights
from mambaquant_ext.model.sites import BlockSite, Contract, TokenSequence
from mambaquant_ext.model.vision.mamba_nd import (
    MambaND,
    MambaNDBlock,
    MambaNDEncoder,
    MambaNDTrunk,
    PatchMerging,
)
from mambaquant_ext.model.vision.mamba_nd_config import LayerOrder, MambaNDConfig
from mambaquant_ext.model.weights import MixerWeights
from mambaquant_ext.routes import Grid, ScanRoute, TokenOrder

MERGING = "down_sample_layer"


class SeparateWalks:
    """forward(x) -> x of shape (batch, tokens, hidden), where a walk covers a part of the grid: a frame, a line.

    Each walk is a sequence of its own, so that they become samples of the batch.
    """

    def __init__(self, order: LayerOrder, grid: Grid) -> None:
        """Takes what tokens belong together.

        Args:
            order: of a layer; its direction does not matter here.
            grid: of all tokens.
        """
        self.order = LayerOrder(order.axes, order.walked, reverse=False)
        self.grid = grid

    def read(self, x: Tensor) -> tuple[Tensor, Grid]:
        """See Contract."""
        walks = self.order.unravel(x, self.grid)
        return walks, (walks.shape[1],)

    def write(self, out: Tensor, _grid: Grid) -> Tensor:
        """See Contract."""
        return self.order.ravel(out, self.grid)


class MambaNDAdapter(ConfiguredAdapter):
    """What classifiers and encoders share (algorithm section 1.4)."""

    config_class = MambaNDConfig

    def trunk(self, model: nn.Module) -> tuple[str, MambaNDTrunk]:
        """The embedding and the layers, and the prefix of their names."""
        raise NotImplementedError

    def sites(self, model: nn.Module) -> list[BlockSite]:
        """See Adapter. Layers behind the last one that an encoder returns never run, and are no sites."""
        prefix, trunk = self.trunk(model)
        out_indices = trunk.config.out_indices
        depth = out_indices[-1] + 1 if out_indices else trunk.config.depth
        return [_site(prefix, trunk, index) for index in range(depth)]


class MambaNDImageAdapter(MambaNDAdapter):
    """Image classifiers: one residual stream, from one merging of tokens to the next.

    Its readers are the blocks' norms alone: a block in front of anything else leaves the rotated basis through its
    skip, which is a matrix anyway (algorithm section 2.3.3, correct form).
    """

    name = "mamba-nd-image"
    head: str | None = "head.fc"
    model_class = MambaND
    axes = 2

    def matches(self, model: nn.Module) -> bool:
        """See Adapter."""
        return isinstance(model, MambaND) and len(model.config.grid) == self.axes

    def trunk(self, model: nn.Module) -> tuple[str, MambaNDTrunk]:
        """See MambaNDAdapter."""
        assert isinstance(model, MambaND)
        return "backbone.", model.backbone

    def rotates_stream(self, model: nn.Module, rotation: Rotation) -> bool:
        """See Adapter.

        A Hadamard matrix inside each block gives in_proj the same input, and leaves the skip a factor a channel.
        """
        return rotation is Rotation.KLT

    def rotate_ends(self, model: nn.Module, rotation: Tensor) -> None:
        """Patches, positions and mergings write the stream that blocks read."""
        _, trunk = self.trunk(model)
        block = trunk.layers[0]
        assert isinstance(block, MambaNDBlock)
        write = rotation_behind(block.norm, rotation)
        rotate_rows_(trunk.patch_embed.projection, write)
        rotate_token_(trunk.pos_embed, write)
        for index in set(trunk.config.downsample) - {trunk.config.depth - 1}:
            merging = trunk.layers[index].get_submodule(MERGING)
            assert isinstance(merging, PatchMerging)
            rotate_rows_(merging.reduction, write)

    def stream_behind(self, model: nn.Module, index: int) -> StreamWrite:
        """See Adapter."""
        _, trunk = self.trunk(model)
        is_read_plainly = index in (*trunk.config.downsample, trunk.config.depth - 1)
        return StreamWrite.PLAIN if is_read_plainly else StreamWrite.CENTERED


class MambaNDVideoAdapter(MambaNDImageAdapter):
    """Video classifiers: the same over volumes, without mergings and final norms."""

    name = "mamba-nd-video"
    head = "cls_head.fc_cls"
    axes = 3


class MambaNDEncoderAdapter(MambaNDAdapter):
    """Encoders, which return the stream behind some layers: it stays unrotated, blocks rotate their own input."""

    name = "mamba-nd-encoder"
    model_class = MambaNDEncoder

    def trunk(self, model: nn.Module) -> tuple[str, MambaNDTrunk]:
        """See MambaNDAdapter."""
        assert isinstance(model, MambaNDEncoder)
        return "", model


def _site(prefix: str, trunk: MambaNDTrunk, index: int) -> BlockSite:
    config, block = trunk.config, trunk.layers[index]
    assert isinstance(block, MambaNDBlock)
    grid, order = config.layer_grid(index), config.layer_order(index)
    walks_all = order.walked == len(grid)
    contract: Contract = TokenSequence(grid) if walks_all else SeparateWalks(order, grid)
    tokens = TokenOrder("axes", order.axes) if walks_all else TokenOrder()
    return BlockSite(
        name=f"{prefix}layers.{index}",
        contract=contract,
        weights=partial(mamba_nd_block_weights, block, ScanRoute(tokens, order.reverse)),
        keeps=(MERGING,) if index in config.downsample else (),
    )


def mamba_nd_block_weights(block: MambaNDBlock, route: ScanRoute) -> MixerWeights:
    """The weights of a block, whose skip carries what its norm gives.

    Args:
        block: float.
        route: its walk.
    """
    weights = mixer_weights(block.mixer, norm_weights(block.norm))
    return weights.replace(
        routes=(route,),
        skip=Skip.NORMALISED,
        skip_weight=torch.ones(weights.hidden),
        skip_bias=torch.zeros(weights.hidden),
    )
