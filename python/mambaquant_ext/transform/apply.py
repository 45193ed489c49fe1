"""The transforms of a recipe, in their order, folded in float64 and cast once."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.artifacts import LayerMoments, MomentStats
from mambaquant_ext.config import Recipe, Rotation
from mambaquant_ext.model import LanguageModelWeights, MixerWeights
from mambaquant_ext.ops import hadamard_matrix
from mambaquant_ext.transform import rotate, smooth
from mambaquant_ext.transform.norms import fold_final_norm


def transform(
    model: LanguageModelWeights,
    stats: MomentStats,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
) -> LanguageModelWeights:
    """An equivalent model, ready for static int8 ranges.

    Order (algorithm section 7.1): S1, S2, S4, centring of dt, S5, then R1, R2, R4, R5.

    Args:
        model: with norms folded where the recipe rotates or smooths behind them (see `needs_folded_norms`).
        stats: moments of this very model on calibration data.
        recipe: which transforms.
        dtype: of the result; everything before the one cast is float64.

    Returns:
        A model with the same function.

    Raises:
        ValueError: too little calibration data for a KLT, a width without a Hadamard matrix, or norms that are
            not folded where R1 needs it.
    """
    rotation = _rotation(
        recipe.residual_rotation, stats.in_moment, stats.samples * len(model.layers)
    )
    layers = tuple(
        transform_layer(layer.to(torch.float64), moments, stats.samples, recipe, rotation).to(dtype)
        for layer, moments in zip(model.layers, stats.layers, strict=True)
    )
    ends = model.replace(layers=()).to(torch.float64)
    if rotation is not None:
        ends = rotate.rotate_residual_ends(fold_final_norm(ends), rotation)
    return ends.to(dtype).replace(layers=layers)


def needs_folded_norms(recipe: Recipe) -> bool:
    """Whether the recipe's transforms expect norms without weights."""
    return recipe.residual_rotation is not Rotation.NONE or recipe.smooth_in


def transform_layer(
    layer: MixerWeights,
    moments: LayerMoments,
    samples: int,
    recipe: Recipe,
    rotation: Tensor | None,
) -> MixerWeights:
    """The transforms of one block.

    Args:
        layer: float64.
        moments: of this block.
        samples: tokens behind them.
        recipe: which transforms.
        rotation: R1, (hidden, hidden), or None.

    Returns:
        The block, float64, in the rotated basis at both ends if `rotation` is given.

    Raises:
        ValueError: too little calibration data for a KLT, a width without a Hadamard matrix, or a rotation of a
            block whose norm is not folded.
    """
    if recipe.smooth_in:
        columns = torch.cat([layer.in_x, layer.in_z]).abs().amax(0)
        layer = smooth.smooth_in(layer, smooth.smoothing_scale(moments.in_amax, columns))
    if recipe.smooth_gate:
        columns = layer.out.abs().amax(0)
        layer = smooth.smooth_gate(layer, smooth.smoothing_scale(moments.out_amax, columns))
    if recipe.smooth_state:
        scale = smooth.smoothing_scale(moments.h_amax.double(), moments.C_amax.double())
        layer = smooth.smooth_state(layer, scale)
    layer, dt_moment = _prepare_dt(layer, moments, recipe)
    if rotation is not None:
        layer = rotate.rotate_residual_layer(layer, rotation)
    if recipe.out_rotation:
        layer = rotate.rotate_out(layer)
    if recipe.state_rotation:
        layer = rotate.rotate_state(layer)
    dt_rotation = _rotation(recipe.dt_rotation, dt_moment, samples)
    return layer if dt_rotation is None else rotate.rotate_dt(layer, dt_rotation)


def _prepare_dt(
    layer: MixerWeights, moments: LayerMoments, recipe: Recipe
) -> tuple[MixerWeights, Tensor]:
    """Centres and smooths dt; the moment of the result follows from the measured one without another pass."""
    low, high = moments.dt_min.double(), moments.dt_max.double()
    mean, moment = moments.dt_mean.double(), moments.dt_moment.double()
    if recipe.center_dt:
        center = (low + high) / 2
        layer = smooth.center_dt(layer, center)
        moment = (
            moment
            - torch.outer(center, mean)
            - torch.outer(mean, center)
            + torch.outer(center, center)
        )
        low, high = low - center, high - center
    if recipe.smooth_dt:
        amax = torch.maximum(low.abs(), high.abs())
        scale = smooth.smoothing_scale(amax, layer.dt.abs().amax(0))
        layer = smooth.smooth_dt(layer, scale)
        moment = moment / torch.outer(scale, scale)
    return layer, moment


def _rotation(kind: Rotation, moment: Tensor, samples: int) -> Tensor | None:
    if kind is Rotation.NONE:
        return None
    if kind is Rotation.HADAMARD:
        return hadamard_matrix(moment.shape[0])
    return rotate.klt_rotation(moment, samples)
