"""Vim: bidirectional blocks on one residual stream, with a class token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from mambaquant_ext.config import Rotation
from mambaquant_ext.model.adapters.registry import Adapter
from mambaquant_ext.model.adapters.streams import (
    folded_norm,
    rotate_head_,
    rotate_rows_,
    rotate_token_,
    rotation_behind,
)
from mambaquant_ext.model.hf import mixer_weights
from mambaquant_ext.model.reading import norm_weights, read_branch, read_conv
from mambaquant_ext.model.sites import BlockSite, ResidualPair
from mambaquant_ext.model.vision.vim import VimBlock, VimMixer, VisionMamba
from mambaquant_ext.model.vision.vim_config import ARCHITECTURE, BimambaType, VimConfig
from mambaquant_ext.model.weights import MixerWeights
from mambaquant_ext.routes import FORWARD, ScanRoute


class VimAdapter(Adapter):
    """Vim with unidirectional, v1 or v2 blocks (algorithm section 1.3)."""

    name = "vim"
    head = "head"

    def matches(self, model: nn.Module) -> bool:
        """See Adapter."""
        return isinstance(model, VisionMamba)

    def sites(self, model: nn.Module) -> list[BlockSite]:
        """See Adapter."""
        assert isinstance(model, VisionMamba)
        position = model.config.cls_token_position
        return [
            BlockSite(
                f"layers.{index}", ResidualPair(), partial(vim_block_weights, block, position)
            )
            for index, block in enumerate(model.layers)
        ]

    def rotates_stream(self, model: nn.Module, rotation: Rotation) -> bool:
        """See Adapter."""
        return True

    def rotate_ends(self, model: nn.Module, rotation: Tensor) -> None:
        """Patches, class token and positions write the stream; final norm and head read it (section 2.3.2)."""
        assert isinstance(model, VisionMamba)
        write = rotation_behind(model.norm_f, rotation)
        rotate_rows_(model.patch_embed.proj, write)
        for name in ("cls_token", "pos_embed"):
            if hasattr(model, name):
                rotate_token_(getattr(model, name), write)
        rotate_head_(model.norm_f, model.head, rotation)

    def prepare_rotated(self, model: nn.Module) -> None:
        """The final norm of a centred stream is an RMSNorm; its weight stands in the head."""
        assert isinstance(model, VisionMamba)
        model.norm_f = folded_norm(model.norm_f)

    def reads(self, config: Mapping[str, Any]) -> bool:
        """See Adapter."""
        return str(config.get("architecture", "")).startswith(ARCHITECTURE)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """See Adapter."""
        assert isinstance(model, VisionMamba)
        return model.config.to_dict()

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """See Adapter."""
        return VisionMamba(VimConfig.from_dict(config))


def vim_block_weights(block: nn.Module, class_token: int | None) -> MixerWeights:
    """The weights of a block.

    Args:
        block: float.
        class_token: its position, or None.
    """
    assert isinstance(block, VimBlock)
    mixer = block.mixer
    weights = mixer_weights(mixer, norm_weights(block.norm)).replace(class_token=class_token)
    if mixer.bimamba_type is BimambaType.NONE:
        return weights
    convs, branch_b = _way_back(mixer, weights)
    takes_mean = mixer.takes_mean and mixer.bimamba_type is BimambaType.V2
    return weights.replace(
        convs=convs,
        branches=(*weights.branches, branch_b),
        routes=(FORWARD, ScanRoute(reverse=True, branch=1)),
        out=weights.out / 2 if takes_mean else weights.out,
    )


def _way_back(mixer: VimMixer, weights: MixerWeights) -> Any:
    """Convolutions of both directions, and the branch of the way back."""
    (conv,), (branch,) = weights.convs, weights.branches
    if mixer.bimamba_type is BimambaType.V1:
        # One convolution, walked forwards, feeds both scans.
        A_b = read_branch(mixer.x_proj, mixer.dt_proj, mixer.A_b_log, mixer.D).A
        return (conv.replace(along_route=False),), branch.replace(A=A_b)
    branch_b = read_branch(mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b, conv=1)
    return (conv, read_conv(mixer.conv1d_b)), branch_b
