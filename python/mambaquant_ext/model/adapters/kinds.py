"""Adapters that find their blocks by what a module is, wherever it stands in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from mambaquant_ext.model.adapters.registry import Adapter
from mambaquant_ext.model.sites import BlockSite, Contract
from mambaquant_ext.model.vision.config_fields import FieldConfig
from mambaquant_ext.model.weights import MixerWeights


@dataclass(frozen=True, slots=True)
class BlockKind:
    """A kind of Mamba block.

    Attributes:
        recognises: whether a module is one. It may be on the meta device.
        contract: how the module is called.
        weights: of the module, see BlockSite.
    """

    recognises: Callable[[nn.Module], bool]
    contract: Callable[[nn.Module], Contract]
    weights: Callable[[nn.Module], MixerWeights]


class KindsAdapter(Adapter):
    """Every module of certain kinds is a block; what surrounds them stays as it is.

    Attributes:
        kinds: the first one that recognises a module reads it. A module inside a block is part of that block.
    """

    kinds: tuple[BlockKind, ...] = ()

    def matches(self, model: nn.Module) -> bool:
        """See Adapter."""
        return next(self._found(model), None) is not None

    def sites(self, model: nn.Module) -> list[BlockSite]:
        """See Adapter."""
        return [
            BlockSite(name, kind.contract(module), partial(kind.weights, module))
            for name, module, kind in self._found(model)
        ]

    def _found(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, BlockKind]]:
        """Name, module and kind of every block.

        A module that several owners hold is found once for each of them: all of them have to be replaced.
        """
        inside: list[str] = []
        for owner_name, owner in model.named_modules():
            if any(owner_name == name or owner_name.startswith(f"{name}.") for name in inside):
                continue
            for leaf, module in owner.named_children():
                kind = next((kind for kind in self.kinds if kind.recognises(module)), None)
                if kind is not None:
                    name = f"{owner_name}.{leaf}" if owner_name else leaf
                    inside.append(name)
                    yield name, module, kind


class FamilyAdapter(KindsAdapter):
    """A family of this package's own models, each made from a configuration.

    Attributes:
        model_class: made from a config_class; has it as `config`.
        config_class: its values.
    """

    model_class: type[nn.Module]
    config_class: type[FieldConfig]

    def matches(self, model: nn.Module) -> bool:
        """See Adapter."""
        return isinstance(model, self.model_class)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """See Adapter."""
        config = model.config
        assert isinstance(config, self.config_class)
        return {"architecture": self.name, **config.to_dict()}

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """See Adapter."""
        fields = {name: value for name, value in config.items() if name != "architecture"}
        return self.model_class(self.config_class.from_dict(fields))
