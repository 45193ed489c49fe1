"""RSMamba (KyanChen/RSMamba) in float, in plain torch: what a quantized RSMamba is measured against.

Parameters have the names and shapes of the public checkpoints. Dropout has no weights and does nothing at
inference; it is left out. The public code draws a new permutation for the shuffled path of every layer at every
call; here a layer has one for good, drawn from RSMambaConfig.shuffle_seed, so that a model is a function.

Source: Chen et al. 2024, "RSMamba: Remote Sensing Image Classification with State Space Model".
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambaquant_ext.model.vision.config import VisionConfig
from mambaquant_ext.model.vision.mixer import MambaMixer
from mambaquant_ext.model.vision.patch_embed import PatchEmbed


class PathType(str, enum.Enum):
    """Which walks a layer makes over the tokens, with the same weights, and how their results are merged."""

    FORWARD = "forward"
    REVERSE_MEAN = "forward_reverse_mean"
    REVERSE_GATE = "forward_reverse_gate"
    SHUFFLE_MEAN = "forward_reverse_shuffle_mean"
    SHUFFLE_GATE = "forward_reverse_shuffle_gate"

    @property
    def paths(self) -> int:
        """1, forward; 2, and reverse; 3, and shuffled."""
        return 1 + ("reverse" in self.value) + ("shuffle" in self.value)

    @property
    def is_gated(self) -> bool:
        """The results are weighted by a gate, not averaged."""
        return self.value.endswith("gate")


@dataclass(frozen=True, slots=True, kw_only=True)
class RSMambaConfig(VisionConfig):
    """An RSMamba without class token, as all published ones.

    Attributes:
        img_size: height and width of an image.
        patch_size: height and width of a patch.
        stride: from one patch to the next; zeros at the right and the bottom complete the last patches.
        path_type: the walks of a layer, and how they are merged.
        shuffle_seed: layer i's shuffled path is permutation(i), drawn from shuffle_seed + i.
        final_norm: LayerNorm ln1 after the last layer.
        norm_epsilon: of all norms.
    """

    img_size: int = 224
    patch_size: int = 16
    stride: int = 8
    path_type: PathType = PathType.SHUFFLE_GATE
    shuffle_seed: int = 0
    final_norm: bool = True
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or outside its range.
        """
        VisionConfig.__post_init__(self)
        for name in ("num_classes", "img_size", "patch_size", "stride"):
            self._require_positive(name)
        if self.shuffle_seed < 0:
            self._refuse("shuffle_seed", "at least 0", self.shuffle_seed)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.img_size, self.img_size

    @property
    def num_patches(self) -> int:
        """Tokens."""
        side = -(-self.img_size // self.stride)
        return side * side

    def permutation(self, index: int) -> Tensor:
        """The shuffled path of a layer.

        Torch does not promise the same numbers for a seed in all of its versions: what is stored with a model is
        this tensor, not the seed.

        Args:
            index: of the layer.

        Returns:
            (num_patches,), int64, on the CPU: the token at each step.
        """
        generator = torch.Generator().manual_seed(self.shuffle_seed + index)
        return torch.randperm(self.num_patches, generator=generator, device="cpu")


# The heads of the UC Merced models; those of AID have 30 classes, those of NWPU-RESISC45 have 45.
RSMAMBA_B = RSMambaConfig(embed_dim=192, depth=24, num_classes=21)
RSMAMBA_L = RSMambaConfig(embed_dim=256, depth=36, num_classes=21)
RSMAMBA_H = RSMambaConfig(embed_dim=320, depth=48, num_classes=21)


class RSMambaBackbone(nn.Module):
    """Everything before the head."""

    def __init__(self, config: RSMambaConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__()
        self.config = config
        width, paths = config.embed_dim, config.path_type.paths
        patch, stride = (config.patch_size,) * 2, (config.stride,) * 2
        self.patch_embed = PatchEmbed(config.channels, width, patch, stride, bias=False)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.num_patches, width))
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.layers = nn.ModuleList(MambaMixer(config.mixer_sizes) for _ in range(config.depth))
        self.gate_layers = nn.ModuleList(
            nn.Sequential(nn.Linear(paths * width, paths, bias=False), nn.Softmax(dim=-1))
            for _ in range(config.depth if config.path_type.is_gated else 0)
        )
        self.ln1 = nn.LayerNorm(width, eps=config.norm_epsilon) if config.final_norm else None
        self.ln2 = nn.LayerNorm(width, eps=config.norm_epsilon)

    def embed(self, images: Tensor) -> Tensor:
        """Patches and positions.

        Args:
            images: (batch, channels, img_size, img_size), normalised (RSMambaConfig.normalize).

        Returns:
            (batch, num_patches, embed_dim).

        Raises:
            ValueError: images of another shape.
        """
        shape = (self.config.channels, self.config.img_size, self.config.img_size)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"RSMamba: expected images (batch, {', '.join(map(str, shape))}), got {tuple(images.shape)}"
            )
        tokens: Tensor = self.patch_embed(images)
        return tokens + self.pos_embed

    def walk(self, index: int, x: Tensor) -> tuple[Tensor, ...]:
        """A layer's mixer along each of its paths, back in storage order.

        Args:
            index: of the layer.
            x: (batch, seqlen, hidden), normalised.

        Returns:
            One (batch, seqlen, hidden) a path: forward, reverse, shuffled.
        """
        layer, paths = self.layers[index], self.config.path_type.paths
        outs = [layer(x)]
        if paths > 1:
            outs.append(layer(x.flip(1)).flip(1))
        if paths > 2:
            order = self.config.permutation(index).to(x.device)
            outs.append(layer(x[:, order])[:, torch.argsort(order)])
        return tuple(outs)

    def merge(self, index: int, outs: tuple[Tensor, ...]) -> Tensor:
        """The mean of the paths, or their sum weighted by the layer's gate.

        The gate sees the mean over the tokens of each path and is one weight a path and sample.

        Args:
            index: of the layer.
            outs: one (batch, seqlen, hidden) a path.

        Returns:
            (batch, seqlen, hidden).
        """
        stacked = torch.stack(outs, 1)
        if not self.config.path_type.is_gated:
            return stacked.mean(1)
        gate: Tensor = self.gate_layers[index](torch.cat([out.mean(1) for out in outs], -1))
        return (gate[:, :, None, None] * stacked).sum(1)

    def forward(self, images: Tensor) -> Tensor:
        """The norm of the mean over the tokens.

        Args:
            images: (batch, channels, img_size, img_size), normalised (RSMambaConfig.normalize).

        Returns:
            (batch, embed_dim).
        """
        x = self.embed(images)
        for index in range(self.config.depth):
            # All layers share one norm.
            x = x + self.merge(index, self.walk(index, self.pre_norm(x)))
        x = x if self.ln1 is None else self.ln1(x)
        pooled: Tensor = self.ln2(x.mean(1))
        return pooled


class RSMamba(nn.Module):
    """The RSMamba classifier."""

    def __init__(self, config: RSMambaConfig) -> None:
        """Weights as at the start of training.

        Args:
            config: of the model.
        """
        super().__init__()
        self.config = config
        self.backbone = RSMambaBackbone(config)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(config.embed_dim, config.num_classes)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: (batch, channels, img_size, img_size), normalised (RSMambaConfig.normalize).

        Returns:
            (batch, num_classes).
        """
        logits: Tensor = self.head(self.backbone(images))
        return logits
