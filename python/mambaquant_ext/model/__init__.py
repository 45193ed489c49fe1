"""What a Mamba model is to this package: plain weights, and a float forward that every other stage uses."""

from mambaquant_ext.artifacts.layout import Merge, NormKind, Skip
from mambaquant_ext.model.forward import MixerState, block_forward, mixer_forward
from mambaquant_ext.model.language import language_model_forward
from mambaquant_ext.model.weights import (
    BranchWeights,
    ConvWeights,
    LanguageModelWeights,
    MixerWeights,
    NormWeights,
)
from mambaquant_ext.routes import (
    FORWARD,
    Grid,
    ScanRoute,
    TokenOrder,
    register_order,
)

__all__ = [
    "FORWARD",
    "BranchWeights",
    "ConvWeights",
    "Grid",
    "LanguageModelWeights",
    "Merge",
    "MixerState",
    "MixerWeights",
    "NormKind",
    "NormWeights",
    "ScanRoute",
    "Skip",
    "TokenOrder",
    "block_forward",
    "language_model_forward",
    "mixer_forward",
    "register_order",
]
