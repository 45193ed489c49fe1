"""Adapters of the float models in this package, each of which is a class and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mambaquant_ext.model.adapters.registry import Adapter
from mambaquant_ext.model.vision.config import VisionConfig
from mambaquant_ext.model.vision.config_fields import FieldConfig

# Names the adapter in a config.json.
ARCHITECTURE = "architecture"


class ConfiguredAdapter(Adapter):
    """A family of models, each made from a configuration.

    Attributes:
        model_class: made from a config_class; has it as `config`.
        config_class: its values.
    """

    model_class: type[nn.Module]
    config_class: type[VisionConfig] | type[FieldConfig]

    def matches(self, model: nn.Module) -> bool:
        """See Adapter."""
        return isinstance(model, self.model_class)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """See Adapter."""
        config = model.config
        assert isinstance(config, self.config_class)
        return {ARCHITECTURE: self.name, **config.to_dict()}

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """See Adapter."""
        values = {name: value for name, value in config.items() if name != ARCHITECTURE}
        return self.model_class(self.config_class.from_dict(values))
