"""Quantized modules that run on the int8 kernels, or emulate them."""

from mambaquant_ext.run.block import QuantMambaBlock
from mambaquant_ext.run.modules import QuantEmbedding, QuantLinear
from mambaquant_ext.run.runner import LanguageRunner, RunnerState

__all__ = ["LanguageRunner", "QuantEmbedding", "QuantLinear", "QuantMambaBlock", "RunnerState"]
