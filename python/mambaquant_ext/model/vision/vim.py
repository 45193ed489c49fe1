"""Vim (Vision Mamba, hustvl/Vim) in float, in plain torch: what a quantized Vim is measured against.

Parameters have the names and shapes of the public checkpoints. Dropout and drop path have no weights and do
nothing at inference; they are left out.

Source: Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State
Space Model".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambaquant_ext.model.vision.mixer import (
    Branch,
    MambaMixer,
    MixerSizes,
    causal_conv1d,
    dt_projection,
    initial_A_log,
    x_projection,
)
from mambaquant_ext.model.vision.vim_config import BimambaType, FinalPool, VimConfig


class VimMixer(MambaMixer):
    """A Mamba-1 mixer that walks over the tokens both ways (algorithm section 1.3)."""

    def __init__(self, sizes: MixerSizes, bimamba_type: BimambaType, takes_mean: bool) -> None:
        """Weights as at the start of training.

        Args:
            sizes: of every weight.
            bimamba_type: which weights the way back has of its own.
            takes_mean: V2 takes the mean of both directions, not their sum.
        """
        super().__init__(sizes)
        self.bimamba_type = bimamba_type
        self.takes_mean = takes_mean
        if bimamba_type is not BimambaType.NONE:
            self.A_b_log = nn.Parameter(initial_A_log(sizes))
        if bimamba_type is BimambaType.V2:
            self.conv1d_b = causal_conv1d(sizes)
            self.x_proj_b = x_projection(sizes)
            self.dt_proj_b = dt_projection(sizes)
            self.D_b = nn.Parameter(torch.ones(sizes.dim))

    @property
    def branch_b(self) -> Branch:
        """The weights of the way back, of a V1 or V2 mixer."""
        if self.bimamba_type is BimambaType.V2:
            return Branch(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return Branch(self.conv1d, self.x_proj, self.dt_proj, self.A_b_log, self.D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The mixer without norm and residual add.

        Both directions share in_proj, the gate and out_proj. A token's gate is the same both ways, so that it is
        applied once, after the directions are merged.

        Args:
            hidden_states: (batch, seqlen, hidden), normalised.

        Returns:
            (batch, seqlen, hidden).
        """
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        inputs = self.branch.inputs(x)
        y = self.branch.scan(inputs)
        if self.bimamba_type is BimambaType.V1:
            y = y + self.branch_b.scan(inputs.flip()).flip(1)
        elif self.bimamba_type is BimambaType.V2:
            y = y + self.branch_b.scan(self.branch_b.inputs(x.flip(1))).flip(1)
            y = y / 2 if self.takes_mean else y
        out: Tensor = self.out_proj(y * F.silu(z))
        return out


class VimBlock(nn.Module):
    """Add, norm, mixer: the residual stream is carried beside the latest mixer output."""

    def __init__(self, config: VimConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__()
        self.norm = _norm(config)
        self.mixer = VimMixer(config.mixer_sizes, config.bimamba_type, config.if_devide_out)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """residual + hidden_states is the residual stream; the mixer sees its norm.

        Args:
            hidden_states: (batch, seqlen, hidden), output of the block before, or the embedded tokens.
            residual: (batch, seqlen, hidden), the stream without hidden_states; None before the first block.

        Returns:
            hidden_states: (batch, seqlen, hidden), not yet added to the stream.
            residual: (batch, seqlen, hidden).
        """
        residual = hidden_states if residual is None else residual + hidden_states
        return self.mixer(self.norm(residual)), residual


class PatchEmbed(nn.Module):
    """Patches of an image to tokens, row by row."""

    def __init__(self, config: VimConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__()
        self.proj = nn.Conv2d(
            config.channels, config.embed_dim, config.patch_size, stride=config.stride
        )

    def forward(self, images: Tensor) -> Tensor:
        """One token a patch.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, num_patches, embed_dim).
        """
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class VisionMamba(nn.Module):
    """The Vim classifier."""

    def __init__(self, config: VimConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.if_cls_token:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, config.embed_dim))
        if config.if_abs_pos_embed:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.seqlen, config.embed_dim))
        self.layers = nn.ModuleList(VimBlock(config) for _ in range(config.depth))
        self.norm_f = _norm(config)
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Patches, class token and positions.

        Args:
            images: (batch, channels, img_size, img_size), normalised (VimConfig.normalize).

        Returns:
            (batch, seqlen, embed_dim).

        Raises:
            ValueError: images of another shape.
        """
        config = self.config
        shape = (config.channels, config.img_size, config.img_size)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"VisionMamba: expected images (batch, {', '.join(map(str, shape))}), "
                f"got {tuple(images.shape)}"
            )
        tokens: Tensor = self.patch_embed(images)
        position = config.cls_token_position
        if position is not None:
            cls_token = self.cls_token.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :position], cls_token, tokens[:, position:]], 1)
        return tokens + self.pos_embed if config.if_abs_pos_embed else tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token, the mean of all tokens, or the last.

        Args:
            tokens: (batch, seqlen, embed_dim), after the final norm.

        Returns:
            (batch, embed_dim).
        """
        if self.config.cls_token_position is not None:
            return tokens[:, self.config.cls_token_position]
        return tokens.mean(1) if self.config.final_pool_type is FinalPool.MEAN else tokens[:, -1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: (batch, channels, img_size, img_size), normalised (VimConfig.normalize).

        Returns:
            (batch, num_classes).
        """
        hidden_states, residual = self.layers[0](self.embed(images))
        for layer in self.layers[1:]:
            hidden_states, residual = layer(hidden_states, residual)
        logits: Tensor = self.head(self.pool(self.norm_f(residual + hidden_states)))
        return logits


def _norm(config: VimConfig) -> nn.Module:
    kind = nn.RMSNorm if config.rms_norm else nn.LayerNorm
    return kind(config.embed_dim, eps=config.norm_epsilon)
