"""Mamba-ND (jacklishufan/Mamba-ND) in float, in plain torch: what a quantized Mamba-ND is measured against.

Parameters have the names and shapes of the public checkpoints. Dropout and drop path have no weights and do
nothing at inference; they are left out.

Source: Li, Singh and Grover 2024, "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data".
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.vision.mamba_nd_config import MambaNDConfig
from mambaquant_ext.model.vision.mixer import MambaMixer
from mambaquant_ext.model.vision.patch_embed import PatchEmbed


class PatchMerging(nn.Module):
    """Two by two tokens to one of the same width."""

    def __init__(self, embed_dim: int) -> None:
        """Weights as at the start of training.

        Args:
            embed_dim: width of a token.
        """
        super().__init__()
        self.norm = nn.LayerNorm(4 * embed_dim)
        self.reduction = nn.Linear(4 * embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Merges, norms, reduces. The four values of a channel lie side by side, row-major.

        Args:
            x: (batch, tokens, embed_dim).
            grid: height and width, even.

        Returns:
            (batch, tokens / 4, embed_dim).
        """
        image = x.transpose(1, 2).unflatten(2, grid)
        merged: Tensor = self.reduction(self.norm(F.unfold(image, 2, stride=2).transpose(1, 2)))
        return merged


class MambaNDBlock(nn.Module):
    """Norm, mixer, add: the skip carries the normalised tokens, not the input (algorithm section 1.4)."""

    def __init__(self, config: MambaNDConfig, index: int) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
            index: of the layer.
        """
        super().__init__()
        self.grid = config.layer_grid(index)
        self.order = config.layer_order(index)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_epsilon)
        self.mixer = MambaMixer(config.mixer_sizes)
        if index in config.downsample:
            # No part of the block: only in the public checkpoints is its place here. The trunk calls it.
            self.down_sample_layer = PatchMerging(config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """n + mixer(n), n = norm(x), along the walks of this layer.

        Args:
            x: (batch, tokens, embed_dim), in storage order.

        Returns:
            (batch, tokens, embed_dim), in storage order.
        """
        normed = self.norm(self.order.unravel(x, self.grid))
        return self.order.ravel(normed + self.mixer(normed), self.grid)


class MambaNDTrunk(nn.Module):
    """What classifiers and encoders share: the embedding and the layers."""

    def __init__(self, config: MambaNDConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embed = PatchEmbed(config.channels, config.embed_dim, patch, patch, bias=True)
        positions = torch.randn(1, math.prod(config.grid), config.embed_dim)
        self.pos_embed = nn.Parameter(0.02 * positions)
        self.layers = nn.ModuleList(MambaNDBlock(config, index) for index in range(config.depth))

    def embed(self, images: Tensor) -> Tensor:
        """Patches and positions.

        Args:
            images: (batch, channels, *input_size), normalised (MambaNDConfig.normalize).

        Returns:
            (batch, tokens, embed_dim).

        Raises:
            ValueError: images of another shape.
        """
        shape = (self.config.channels, *self.config.input_size)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"MambaND: expected images (batch, {', '.join(map(str, shape))}), got {tuple(images.shape)}"
            )
        tokens: Tensor = self.patch_embed(images)
        return tokens + self.pos_embed

    def step(self, index: int, x: Tensor) -> Tensor:
        """A layer, and the merging behind it if there is one.

        Args:
            index: of the layer.
            x: (batch, tokens, embed_dim), in storage order.

        Returns:
            (batch, tokens, embed_dim), in storage order; a fourth of the tokens after merging.
        """
        layer = self.layers[index]
        x = layer(x)
        if index in self.config.downsample:
            x = layer.get_submodule("down_sample_layer")(x, self.config.layer_grid(index))
        return x


class MambaNDBackbone(MambaNDTrunk):
    """A classifier without its head."""

    def __init__(self, config: MambaNDConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__(config)
        width, eps = config.embed_dim, config.final_norm_epsilon
        self.ln1 = nn.LayerNorm(width, eps=eps) if config.final_norm else None
        self.ln2 = nn.LayerNorm(width, eps=eps) if config.pooled_norm else None

    def forward(self, images: Tensor) -> Tensor:
        """The mean over the tokens, with the final norms that the model has.

        Args:
            images: (batch, channels, *input_size), normalised (MambaNDConfig.normalize).

        Returns:
            (batch, embed_dim).
        """
        x = self.embed(images)
        for index in range(self.config.depth):
            x = self.step(index, x)
        x = x if self.ln1 is None else self.ln1(x)
        pooled = x.mean(1)
        return pooled if self.ln2 is None else self.ln2(pooled)


class MambaND(nn.Module):
    """The classifier of images or videos."""

    def __init__(self, config: MambaNDConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of a model with a head.

        Raises:
            ValueError: the configuration of an encoder.
        """
        super().__init__()
        if config.num_classes == 0:
            raise ValueError("MambaND: expected a configuration with num_classes, got an encoder's")
        self.config = config
        self.backbone = MambaNDBackbone(config)
        # Image and video models come from two frameworks, which name their heads differently.
        linear = nn.Linear(config.embed_dim, config.num_classes)
        if len(config.grid) == 2:
            self.head = nn.Sequential(OrderedDict(fc=linear))
        else:
            self.cls_head = nn.Sequential(OrderedDict(fc_cls=linear))

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: (batch, channels, *input_size), normalised (MambaNDConfig.normalize).

        Returns:
            (batch, num_classes).
        """
        head = self.head if len(self.config.grid) == 2 else self.cls_head
        logits: Tensor = head(self.backbone(images))
        return logits


class MambaNDEncoder(MambaNDTrunk):
    """The encoder of a segmentation model, which returns the maps of some of its layers."""

    def __init__(self, config: MambaNDConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: with out_indices.

        Raises:
            ValueError: the configuration of a classifier.
        """
        if not config.out_indices:
            raise ValueError(
                "MambaNDEncoder: expected out_indices, got a classifier's configuration"
            )
        super().__init__(config)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers out_indices. Layers after the last of them are not run.

        Args:
            images: (batch, channels, *input_size), normalised (MambaNDConfig.normalize).

        Returns:
            One (batch, embed_dim, *grid) for each of out_indices.
        """
        x, maps = self.embed(images), []
        for index in range(self.config.out_indices[-1] + 1):
            x = self.step(index, x)
            if index in self.config.out_indices:
                grid = self.config.layer_grid(index + 1)
                maps.append(x.transpose(1, 2).unflatten(2, grid))
        return tuple(maps)
