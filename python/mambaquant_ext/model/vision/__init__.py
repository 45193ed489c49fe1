"""Float reference models for vision, under the parameter names of the public checkpoints."""

from mambaquant_ext.model.vision.vim import VisionMamba
from mambaquant_ext.model.vision.vim_config import BimambaType, FinalPool, VimConfig

__all__ = ["BimambaType", "FinalPool", "VimConfig", "VisionMamba"]
