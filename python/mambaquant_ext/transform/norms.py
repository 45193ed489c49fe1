"""Folding of the norms' weights into the linears behind them: the precondition of rotating the residual stream.

Source: algorithm section 2.3.1.
"""

from __future__ import annotations

import torch

from mambaquant_ext.model import LanguageModelWeights, MixerWeights


def fold_norm(layer: MixerWeights) -> MixerWeights:
    """in_proj <- in_proj diag(gamma), gamma <- 1.

    Args:
        layer: any floating dtype; float64 when the result is cast once afterwards.

    Returns:
        A block with the same function whose norm has no weight.
    """
    gamma = layer.norm_weight
    return layer.replace(
        in_x=layer.in_x * gamma, in_z=layer.in_z * gamma, norm_weight=torch.ones_like(gamma)
    )


def fold_final_norm(model: LanguageModelWeights) -> LanguageModelWeights:
    """lm_head <- lm_head diag(gamma_f), gamma_f <- 1. The head is no longer tied to the embedding.

    Args:
        model: any floating dtype; its layers stay as they are.

    Returns:
        A model with the same function whose final norm has no weight.
    """
    return model.replace(lm_head=model.lm_head * model.norm_f, norm_f=torch.ones_like(model.norm_f))
