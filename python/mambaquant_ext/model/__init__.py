"""What a Mamba model is to this package: plain weights, and a float forward that every other stage uses."""

from mambaquant_ext.model.forward import MixerState, language_model_forward, mixer_forward
from mambaquant_ext.model.weights import LanguageModelWeights, MixerWeights

__all__ = [
    "LanguageModelWeights",
    "MixerState",
    "MixerWeights",
    "language_model_forward",
    "mixer_forward",
]
