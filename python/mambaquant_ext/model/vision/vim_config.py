"""The configuration of Vim (hustvl/Vim), with the field names of the public code, and the published sizes."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambaquant_ext.model.vision.config import VisionConfig


class BimambaType(str, enum.Enum):
    """How a block walks over the tokens.

    NONE walks forward only. V1 walks both ways over one set of scan inputs, made in forward order, with an A of
    its own for the way back. V2 has a second set of everything between in_proj and out_proj for the way back.
    """

    NONE = "none"
    V1 = "v1"
    V2 = "v2"


class FinalPool(str, enum.Enum):
    """What the head sees of a model without a class token: the last token, or the mean of all."""

    NONE = "none"
    MEAN = "mean"


# What a Vim's config.json calls it; others may add to the name.
ARCHITECTURE = "VisionMamba"
# Keys of a config.json that this implementation knows in one value only.
_FIXED: dict[str, Any] = {
    "dt_proj_bias": True,
    "flip_img_sequences_ratio": -1.0,
    "if_bidirectional": False,
    "if_bimamba": False,
    "if_rope": False,
    "if_rope_residual": False,
    "init_layer_scale": None,
    "use_double_cls_token": False,
}
# Keys that change no float result at inference: training, and which kernels compute.
_INERT = {
    "architecture",
    "drop_path_rate",
    "drop_rate",
    "dtype",
    "fused_add_norm",
    "residual_in_fp32",
}
# Keys that follow from others; a file that disagrees with itself is refused.
_DERIVED = ("num_patches", "d_inner", "cls_token_position")


@dataclass(frozen=True, slots=True, kw_only=True)
class VimConfig(VisionConfig):
    """A Vim, with the field names of the public code.

    Attributes:
        img_size: height and width of an image.
        patch_size: height and width of a patch.
        stride: from one patch to the next.
        bimamba_type: how a block walks over the tokens.
        if_devide_out: V2 takes the mean of both directions, not their sum.
        if_cls_token: the head sees a class token.
        use_middle_cls_token: the class token stands at num_patches // 2, not first.
        if_abs_pos_embed: every token has a learned position embedding.
        rms_norm: RMSNorm, not LayerNorm.
        final_pool_type: for a model without a class token.
    """

    img_size: int = 224
    patch_size: int = 16
    stride: int = 16
    bimamba_type: BimambaType = BimambaType.V2
    if_devide_out: bool = True
    if_cls_token: bool = True
    use_middle_cls_token: bool = True
    if_abs_pos_embed: bool = True
    rms_norm: bool = True
    final_pool_type: FinalPool = FinalPool.MEAN

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or outside its range, or a patch larger than the image.
        """
        VisionConfig.__post_init__(self)
        for name in ("num_classes", "img_size", "patch_size", "stride"):
            self._require_positive(name)
        if self.patch_size > self.img_size:
            self._refuse("patch_size", f"at most img_size = {self.img_size}", self.patch_size)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.img_size, self.img_size

    @property
    def num_patches(self) -> int:
        """Tokens without the class token."""
        side = (self.img_size - self.patch_size) // self.stride + 1
        return side * side

    @property
    def seqlen(self) -> int:
        """Tokens with the class token, if there is one."""
        return self.num_patches + self.if_cls_token

    @property
    def cls_token_position(self) -> int | None:
        """Index of the class token among all tokens."""
        if not self.if_cls_token:
            return None
        return self.num_patches // 2 if self.use_middle_cls_token else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with the architecture by which a config.json is known for a Vim's."""
        return {"architecture": ARCHITECTURE, **VisionConfig.to_dict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VimConfig:
        """From the keys of a config.json; the inverse of to_dict.

        Args:
            values: fields of this class; and keys of the public code that this implementation has in one value
                only, that change no result, or that follow from the fields.

        Raises:
            ValueError: an unknown or missing field, a value of the wrong type or range, a model that is not
                supported, or a derived key that disagrees with the fields.
        """
        fields = {}
        for name, value in values.items():
            if name in _FIXED and value != _FIXED[name]:
                raise ValueError(
                    f"VimConfig.{name}: expected {_FIXED[name]!r}, the only value supported, got {value!r}"
                )
            if name not in _FIXED and name not in _INERT and name not in _DERIVED:
                fields[name] = value
        config = super(VimConfig, cls).from_dict(fields)
        for name in _DERIVED:
            if name in values and values[name] != getattr(config, name):
                raise ValueError(
                    f"VimConfig.{name}: expected {getattr(config, name)!r}, as the other fields say, "
                    f"got {values[name]!r}"
                )
        return config


VIM_TINY = VimConfig(embed_dim=192, depth=24, num_classes=1000)
VIM_SMALL = VimConfig(embed_dim=384, depth=24, num_classes=1000)
VIM_BASE = VimConfig(embed_dim=768, depth=24, num_classes=1000)
VIM_TINY_PLUS = VimConfig(embed_dim=192, depth=24, num_classes=1000, stride=8)
VIM_SMALL_PLUS = VimConfig(embed_dim=384, depth=24, num_classes=1000, stride=8)
VIM_BASE_PLUS = VimConfig(embed_dim=768, depth=24, num_classes=1000, stride=8)
