"""What the configurations of all vision models have in common: fields, checks, JSON both ways."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mambaquant_ext.model.vision.config_fields import plain, typed
from mambaquant_ext.model.vision.mixer import MixerSizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_Config = TypeVar("_Config", bound="VisionConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A stack of Mamba-1 blocks over the patches of an image or a volume.

    Attributes:
        embed_dim: width of a token.
        depth: number of blocks.
        num_classes: width of the head; 0 only where a class says that it may have none.
        channels: of the input.
        d_state: states per inner channel.
        d_conv: taps of the causal convolution.
        expand: inner width over embed_dim.
        dt_rank: width between x_proj and dt_proj; "auto" is embed_dim / 16, rounded up.
        in_proj_bias: in_proj has a bias.
        out_proj_bias: out_proj has a bias.
        conv_bias: conv1d has a bias.
        norm_epsilon: of the norms of the blocks.
        mean: of each input channel, of values in [0, 1].
        std: of each input channel.
        class_names: in the order of the logits, or empty.
    """

    embed_dim: int
    depth: int
    num_classes: int
    channels: int = 3
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    in_proj_bias: bool = False
    out_proj_bias: bool = False
    conv_bias: bool = True
    norm_epsilon: float = 1e-5
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or outside its range, or lengths that do not match.
        """
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _accepts(kind, value):
                self._refuse(name, _description(kind), value)
        for name in ("embed_dim", "depth", "channels", "d_state", "d_conv", "expand"):
            self._require_positive(name)
        if self.dt_rank != "auto":
            self._require_positive("dt_rank")
        if not self.norm_epsilon > 0:
            self._refuse("norm_epsilon", "a positive number", self.norm_epsilon)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                self._refuse(name, f"{self.channels} values, one a channel", getattr(self, name))
        if not all(value > 0 for value in self.std):
            self._refuse("std", "positive values", self.std)
        if self.class_names and len(self.class_names) != self.num_classes:
            self._refuse("class_names", f"{self.num_classes} names or none", self.class_names)

    @property
    def d_inner(self) -> int:
        """Inner width of a block."""
        return self.expand * self.embed_dim

    @property
    def mixer_sizes(self) -> MixerSizes:
        """Sizes of every block's mixer."""
        rank = math.ceil(self.embed_dim / 16) if self.dt_rank == "auto" else self.dt_rank
        return MixerSizes(
            hidden=self.embed_dim,
            dim=self.d_inner,
            dstate=self.d_state,
            dt_rank=rank,
            width=self.d_conv,
            has_in_bias=self.in_proj_bias,
            has_out_bias=self.out_proj_bias,
            has_conv_bias=self.conv_bias,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std, as the model expects its input.

        Args:
            images: (batch, channels, ...), uint8.

        Returns:
            (batch, channels, ...), float32.

        Raises:
            ValueError: another dtype or another number of channels.
        """
        if images.dtype != torch.uint8 or images.dim() < 2 or images.shape[1] != self.channels:
            raise ValueError(
                f"normalize: expected images (batch, {self.channels}, ...), uint8, "
                f"got {tuple(images.shape)}, {images.dtype}"
            )
        shape = (-1,) + (1,) * (images.dim() - 2)
        mean, std = (
            torch.tensor(values, device=images.device).view(shape)
            for values in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The inverse of to_dict; fields that are absent take their defaults.

        Args:
            values: plain values, as JSON gives them.

        Raises:
            ValueError: an unknown or missing field, or a value of the wrong type or range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for name in values:
            if name not in fields:
                raise ValueError(f"{cls.__name__}.{name}: unknown field")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ValueError(f"{cls.__name__}.{name}: missing")
        return cls(**{name: typed(value, hints[name]) for name, value in values.items()})

    def _require_positive(self, name: str) -> None:
        if getattr(self, name) < 1:
            self._refuse(name, "at least 1", getattr(self, name))

    def _refuse(self, name: str, expected: str, value: object) -> typing.NoReturn:
        raise ValueError(f"{type(self).__name__}.{name}: expected {expected}, got {value!r}")


def _accepts(kind: Any, value: object) -> bool:
    """Whether `value` has the type that an annotation names; a bool is no number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_accepts(arguments[0], item) for item in value)
    if origin in {typing.Union, types.UnionType}:
        return any(_accepts(argument, value) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _description(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in kind)}"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
