"""MambaQuant in real int8: rotate, smooth, pack and run Mamba models on hand-written kernels."""

from mambaquant_ext._load import built_isas, current_isa, force_isa, forced_isa, supported_isas

__version__ = "0.1.0"

__all__ = ["built_isas", "current_isa", "force_isa", "forced_isa", "supported_isas"]
