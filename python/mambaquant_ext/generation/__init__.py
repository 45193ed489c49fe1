"""Text from a language model: the loop, the native sampler, and text that streams."""

from mambaquant_ext.generation.loop import Runner, TokenStream, generate, stream
from mambaquant_ext.generation.modules import ModuleRunner
from mambaquant_ext.generation.options import FinishReason, GenerationOptions
from mambaquant_ext.generation.result import GeneratedSequence, Generation, Step
from mambaquant_ext.generation.sampler import Sampler
from mambaquant_ext.generation.text import IncrementalDecoder, StopFilter, Tokenizer

__all__ = [
    "FinishReason",
    "GeneratedSequence",
    "Generation",
    "GenerationOptions",
    "IncrementalDecoder",
    "ModuleRunner",
    "Runner",
    "Sampler",
    "Step",
    "StopFilter",
    "TokenStream",
    "Tokenizer",
    "generate",
    "stream",
]
