"""How good a model is: perplexity on texts, accuracy on images."""

from mambaquant_ext.evaluate.classification import Classification, agreement, classify
from mambaquant_ext.evaluate.perplexity import Evaluation, evaluate, windows

__all__ = ["Classification", "Evaluation", "agreement", "classify", "evaluate", "windows"]
