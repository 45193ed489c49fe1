"""MambaQuant in real int8: rotate, smooth, pack and run Mamba models on hand-written kernels.

from mambaquant_ext import quantize_, recipe
packed = quantize_(model, batches, recipe("w8a8"))   # model: transformers.MambaForCausalLM
"""

from mambaquant_ext._load import built_isas, current_isa, force_isa, forced_isa, supported_isas
from mambaquant_ext.artifacts import CheckpointError, PackedModel
from mambaquant_ext.checkpoint import load, load_runner, prepack, save
from mambaquant_ext.config import Fidelity, Granularity, Observer, Recipe, Rotation, recipe
from mambaquant_ext.generation import FinishReason, Generation, GenerationOptions, generate, stream
from mambaquant_ext.pipeline import quantize_
from mambaquant_ext.run import LanguageRunner, QuantMambaBlock, RunnerState
from mambaquant_ext.selftest import self_test

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Fidelity",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "Granularity",
    "LanguageRunner",
    "Observer",
    "PackedModel",
    "QuantMambaBlock",
    "Recipe",
    "Rotation",
    "RunnerState",
    "built_isas",
    "current_isa",
    "force_isa",
    "forced_isa",
    "generate",
    "load",
    "load_runner",
    "prepack",
    "quantize_",
    "recipe",
    "save",
    "self_test",
    "stream",
    "supported_isas",
]
