"""Float reference models for vision, under the parameter names of the public checkpoints."""

from mambaquant_ext.model.vision.mamba_nd import MambaND, MambaNDEncoder
from mambaquant_ext.model.vision.mamba_nd_config import Factorization, LayerOrder, MambaNDConfig
from mambaquant_ext.model.vision.rsmamba import PathType, RSMamba, RSMambaConfig
from mambaquant_ext.model.vision.vim import VisionMamba
from mambaquant_ext.model.vision.vim_config import BimambaType, FinalPool, VimConfig

__all__ = [
    "BimambaType",
    "Factorization",
    "FinalPool",
    "LayerOrder",
    "MambaND",
    "MambaNDConfig",
    "MambaNDEncoder",
    "PathType",
    "RSMamba",
    "RSMambaConfig",
    "VimConfig",
    "VisionMamba",
]
