"""Adapters: what this package must know of a model to quantize it, registered by name.

Whoever has a model of their own writes one and registers it; nothing here needs to change (docs/adapters.md).
"""

from mambaquant_ext.model.adapters.mamba_nd import (
    MambaNDEncoderAdapter,
    MambaNDImageAdapter,
    MambaNDVideoAdapter,
)
from mambaquant_ext.model.adapters.registry import (
    Adapter,
    adapter,
    adapter_for,
    adapter_names,
    adapter_of_config,
    register_adapter,
)
from mambaquant_ext.model.adapters.rsmamba import RSMambaAdapter
from mambaquant_ext.model.adapters.vim import VimAdapter

__all__ = [
    "Adapter",
    "adapter",
    "adapter_for",
    "adapter_names",
    "adapter_of_config",
    "register_adapter",
]

register_adapter(VimAdapter())
register_adapter(MambaNDImageAdapter())
register_adapter(MambaNDVideoAdapter())
register_adapter(MambaNDEncoderAdapter())
register_adapter(RSMambaAdapter())
