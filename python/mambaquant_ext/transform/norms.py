"""Folding of the norms' weights into the linears behind them: the precondition of rotating what a norm gives.

Source: algorithm sections 2.3.1 and 2.3.3.
"""

from __future__ import annotations

import torch

from mambaquant_ext.model import LanguageModelWeights, MixerWeights, Skip


def fold_norm(layer: MixerWeights) -> MixerWeights:
    """in_proj <- in_proj diag(gamma), its bias + in_proj beta; gamma <- 1, beta <- 0.

    A normalised skip, which carries what the norm gives, takes gamma and beta over.

    Args:
        layer: any floating dtype; float64 when the result is cast once afterwards.

    Returns:
        A block with the same function whose norm, if it has one, has no weight and no bias.

    Raises:
        ValueError: a block that is rotated in front of in_proj.
    """
    norm = layer.norm
    if norm is None:
        return layer
    if layer.has_in_rotation:
        raise ValueError("fold_norm: expected a block that is not rotated behind its norm")
    gamma, beta = norm.weight, norm.bias
    has_gate = layer.in_z is not None and layer.in_z_bias is not None
    folded = layer.replace(
        norm=norm.replace(weight=torch.ones_like(gamma), bias=torch.zeros_like(beta)),
        in_x=layer.in_x * gamma,
        in_x_bias=layer.in_x_bias + layer.in_x @ beta,
        in_z=layer.in_z * gamma if has_gate else None,  # type: ignore[operator]
        in_z_bias=layer.in_z_bias + layer.in_z @ beta if has_gate else None,  # type: ignore[operator]
    )
    if layer.skip is not Skip.NORMALISED:
        return folded
    assert layer.skip_weight is not None and layer.skip_bias is not None
    if layer.skip_weight.dim() == 2:
        raise ValueError("fold_norm: expected a skip with one factor a channel, got a matrix")
    return folded.replace(
        skip_weight=layer.skip_weight * gamma,
        skip_bias=layer.skip_bias + layer.skip_weight * beta,
    )


def fold_final_norm(model: LanguageModelWeights) -> LanguageModelWeights:
    """lm_head <- lm_head diag(gamma_f), gamma_f <- 1. The head is no longer tied to the embedding.

    Args:
        model: any floating dtype; its layers stay as they are.

    Returns:
        A model with the same function whose final norm has no weight.
    """
    return model.replace(lm_head=model.lm_head * model.norm_f, norm_f=torch.ones_like(model.norm_f))
