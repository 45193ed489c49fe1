"""The registry of adapters, and what an adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mambaquant_ext.artifacts import StreamWrite
from mambaquant_ext.config import Rotation
from mambaquant_ext.model.sites import BlockSite

_ADAPTERS: dict[str, Adapter] = {}


class Adapter:
    """What is to be known of a family of models.

    Attributes:
        name: in the registry and in checkpoints.
        head: name of the linear layer behind the blocks that becomes int8, or None.
    """

    name: str = ""
    head: str | None = None

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""
        raise NotImplementedError

    def sites(self, model: nn.Module) -> list[BlockSite]:
        """The model's Mamba blocks, in the order in which data meets them.

        Args:
            model: that matches. Its weights may be on the meta device, as long as none are read.
        """
        raise NotImplementedError

    def rotates_stream(self, model: nn.Module, rotation: Rotation) -> bool:
        """Whether R1 is folded into the ends of one residual stream that runs through all blocks.

        Args:
            model: that matches.
            rotation: which kind, not NONE. Where this is False, each block transforms its own input by a Hadamard
                matrix.
        """
        return False

    def rotate_ends(self, model: nn.Module, rotation: Tensor) -> None:
        """Folds R1 into what writes the stream before the first block and reads it behind the last, in place.

        Args:
            model: float64; its blocks are not looked at.
            rotation: (hidden, hidden), float64, orthogonal: the stream becomes x R. `prepare_rotated` comes after it.
        """
        raise NotImplementedError

    def prepare_rotated(self, model: nn.Module) -> None:
        """Gives modules around the blocks the kind that they need where the stream is rotated, in place.

        Their tensors come from what `rotate_ends` folded.

        Args:
            model: that matches.
        """

    def stream_behind(self, model: nn.Module, index: int) -> StreamWrite:
        """What the rotated stream has to be behind a block.

        Args:
            model: that matches.
            index: of the block in `sites`.
        """
        return StreamWrite.CENTERED

    def config(self, model: nn.Module) -> dict[str, Any]:
        """What `build` makes an equal model from: plain values that `reads` knows again.

        Empty where the model must come from the user.
        """
        return {}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family."""
        return config.get("architecture") == self.name

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """A model from a configuration, with weights of any value.

        Args:
            config: from `config`, or of a checkpoint folder's config.json.

        Raises:
            ValueError: a value that is not supported.
            NotImplementedError: this family's models come from the user.
        """
        raise NotImplementedError(
            f"adapter {self.name!r} cannot build a model: load the checkpoint into one with load(folder, model=...)"
        )


def register_adapter(adapter: Adapter) -> Adapter:
    """Makes a family of models known. Later ones are asked first, so that a special case can stand before a general.

    Raises:
        ValueError: no name, or a name that is taken.
    """
    if not adapter.name or adapter.name in _ADAPTERS:
        raise ValueError(f"register_adapter: expected a new name, got {adapter.name!r}")
    _ADAPTERS[adapter.name] = adapter
    return adapter


def adapter(name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        ValueError: no such adapter.
    """
    if name not in _ADAPTERS:
        raise ValueError(
            f"adapter: expected one of {', '.join(_ADAPTERS)}, got {name!r}; register_adapter adds one"
        )
    return _ADAPTERS[name]


def adapter_names() -> tuple[str, ...]:
    """Names of all adapters, in the order in which they were registered."""
    return tuple(_ADAPTERS)


def adapter_of_config(config: Mapping[str, Any]) -> Adapter | None:
    """The adapter that reads a config.json, or None.

    Args:
        config: its values.
    """
    return next((known for known in reversed(_ADAPTERS.values()) if known.reads(config)), None)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter that knows a model.

    Raises:
        TypeError: none does.
    """
    for candidate in reversed(_ADAPTERS.values()):
        if candidate.matches(model):
            return candidate
    raise TypeError(
        f"expected a model of a known family ({', '.join(_ADAPTERS)}), got {type(model).__name__}; "
        "register_adapter makes another one known"
    )
