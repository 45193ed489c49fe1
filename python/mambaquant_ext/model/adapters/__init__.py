"""Adapters: what this package must know of a model to quantize it, registered by name.

Whoever has a model of their own writes one and registers it; nothing here needs to change (docs/adapters.md).
"""

from mambaquant_ext.model.adapters.kinds import BlockKind, KindsAdapter
from mambaquant_ext.model.adapters.mamba_nd import (
    MambaNDEncoderAdapter,
    MambaNDImageAdapter,
    MambaNDVideoAdapter,
)
from mambaquant_ext.model.adapters.mhs_vm import MHSAdapter
from mambaquant_ext.model.adapters.mixers import MixersAdapter, UNetAdapter
from mambaquant_ext.model.adapters.msvmamba import MSVMambaAdapter
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
from mambaquant_ext.model.adapters.vmamba import VMambaAdapter
from mambaquant_ext.model.sites import ChannelsFirst, ChannelsLast, ResidualPair, TokenSequence

__all__ = [
    "Adapter",
    "BlockKind",
    "ChannelsFirst",
    "ChannelsLast",
    "KindsAdapter",
    "ResidualPair",
    "TokenSequence",
    "adapter",
    "adapter_for",
    "adapter_names",
    "adapter_of_config",
    "register_adapter",
]

# The last one registered is asked first.
for _adapter in (
    MixersAdapter(),
    UNetAdapter(),
    MHSAdapter(),
    MSVMambaAdapter(),
    VMambaAdapter(),
    RSMambaAdapter(),
    MambaNDEncoderAdapter(),
    MambaNDVideoAdapter(),
    MambaNDImageAdapter(),
    VimAdapter(),
):
    register_adapter(_adapter)
