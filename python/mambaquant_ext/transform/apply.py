"""The transforms of a recipe, in their order, folded in float64 and cast once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambaquant_ext.artifacts import BranchMoments, LayerMoments, MomentStats, StreamWrite
from mambaquant_ext.config import Recipe, Rotation
from mambaquant_ext.model import BranchWeights, LanguageModelWeights, MixerWeights
from mambaquant_ext.transform import rotate, smooth
from mambaquant_ext.transform.norms import fold_final_norm


@dataclass(frozen=True, slots=True)
class StreamRotation:
    """What becomes of a block's input: R1.

    Attributes:
        matrix: (hidden, hidden), of the whole residual stream, folded into weights; None where the stream stays.
        is_local: the block alone transforms what its norm gives, online.
        stream: behind the block, see rotate_residual_layer.
    """

    matrix: Tensor | None = None
    is_local: bool = False
    stream: StreamWrite = StreamWrite.CENTERED


UNROTATED = StreamRotation()


def transform(
    model: LanguageModelWeights,
    stats: MomentStats,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
) -> LanguageModelWeights:
    """An equivalent language model, ready for static int8 ranges.

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
    rotation = stream_rotation(stats, recipe)
    layers = transform_layers(
        model.layers, stats, recipe, [StreamRotation(rotation)] * len(model.layers), dtype
    )
    ends = model.replace(layers=()).to(torch.float64)
    if rotation is not None:
        ends = rotate.rotate_residual_ends(fold_final_norm(ends), rotation)
    return ends.to(dtype).replace(layers=layers)


def transform_layers(
    layers: Sequence[MixerWeights],
    stats: MomentStats,
    recipe: Recipe,
    rotations: Sequence[StreamRotation],
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> tuple[MixerWeights, ...]:
    """transform_layer for every block of a model.

    Args:
        layers: any dtype.
        stats: moments of these very blocks.
        recipe: which transforms.
        rotations: of each block's input.
        dtype: of the result.
        names: of the blocks, for errors; "layer 0" and so on by default.

    Raises:
        ValueError: as transform_layer; begins with the block's name.
    """
    if names is None:
        names = [f"layer {index}" for index in range(len(layers))]
    transformed = []
    for name, layer, moments, rotation in zip(names, layers, stats.layers, rotations, strict=True):
        try:
            exact = transform_layer(layer.to(torch.float64), moments, recipe, rotation)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        transformed.append(exact.to(dtype))
    return tuple(transformed)


def stream_rotation(stats: MomentStats, recipe: Recipe) -> Tensor | None:
    """R1 of a whole residual stream, by the recipe.

    Args:
        stats: moments of blocks of one width.
        recipe: its residual_rotation.

    Returns:
        (hidden, hidden), float64, orthogonal, or None.

    Raises:
        ValueError: blocks of several widths, too little calibration data for a KLT, or a width without a Hadamard
            matrix.
    """
    if recipe.residual_rotation is Rotation.NONE:
        return None
    if stats.in_moment is None:
        raise ValueError("stream_rotation: expected blocks of one width, got several")
    return _rotation(recipe.residual_rotation, stats.in_moment, stats.samples * len(stats.layers))


def needs_folded_norms(recipe: Recipe) -> bool:
    """Whether the recipe's transforms expect norms without weights."""
    return recipe.residual_rotation is not Rotation.NONE or recipe.smooth_in


def transform_layer(
    layer: MixerWeights,
    moments: LayerMoments,
    recipe: Recipe,
    rotation: StreamRotation = UNROTATED,
) -> MixerWeights:
    """The transforms of one block.

    Order (algorithm section 7.1): S1, S2, S4, centring of dt, S5, then R1, R2, R4, R5.

    Args:
        layer: float64.
        moments: of this block.
        recipe: which transforms.
        rotation: R1.

    Returns:
        The block, float64, in the rotated basis at both ends if the stream is rotated.

    Raises:
        ValueError: too little calibration data for a KLT, a width without a Hadamard matrix, a rotation of a block
            whose norm is not folded, or smoothing of a state that is rotated already.
    """
    if recipe.smooth_state and layer.has_state_rotation:
        raise ValueError("smooth_state: expected a block whose state axis is not rotated yet")
    if recipe.smooth_in and layer.norm is not None:
        parts = [layer.in_x] if layer.in_z is None else [layer.in_x, layer.in_z]
        columns = torch.cat(parts).abs().amax(0)
        layer = smooth.smooth_in(layer, smooth.smoothing_scale(moments.in_amax, columns))
    if recipe.smooth_gate and smooth.can_smooth_gate(layer):
        columns = layer.out.abs().amax(0)
        layer = smooth.smooth_gate(layer, smooth.smoothing_scale(moments.out_amax, columns))
    branches = zip(layer.branches, moments.branches, strict=True)
    layer = layer.replace(branches=tuple(_transform_branch(b, m, recipe) for b, m in branches))
    if rotation.matrix is not None:
        layer = rotate.rotate_residual_layer(layer, rotation.matrix, rotation.stream)
    elif rotation.is_local:
        layer = rotate.rotate_in(layer)
    if recipe.out_rotation:
        layer = rotate.rotate_out(layer)
    if recipe.state_rotation:
        layer = rotate.rotate_state(layer)
    return layer if recipe.separate_class_token else layer.replace(class_token=None)


def _transform_branch(
    branch: BranchWeights, moments: BranchMoments, recipe: Recipe
) -> BranchWeights:
    """S4, centring, S5 and R5; the moment of each new dt follows from the measured one without another pass."""
    if recipe.smooth_state:
        scale = smooth.smoothing_scale(moments.h_amax.double(), moments.C_amax.double())
        branch = smooth.smooth_state(branch, scale)
    low, high = moments.dt_min.double(), moments.dt_max.double()
    mean, moment = moments.dt_mean.double(), moments.dt_moment.double()
    if recipe.center_dt:
        center = (low + high) / 2
        branch = smooth.center_dt(branch, center)
        moment = (
            moment
            - torch.outer(center, mean)
            - torch.outer(mean, center)
            + torch.outer(center, center)
        )
        low, high = low - center, high - center
    if recipe.smooth_dt:
        amax = torch.maximum(low.abs(), high.abs())
        scale = smooth.smoothing_scale(amax, branch.dt.abs().amax(0))
        branch = smooth.smooth_dt(branch, scale)
        moment = moment / torch.outer(scale, scale)
    if recipe.dt_rotation is Rotation.NONE:
        return branch
    # A rank without a Hadamard matrix is widened by zeros: rows that cost little, and no other transform exists.
    rank = rotate.rotatable_rank(branch.dt_rank)
    padded = torch.zeros(rank, rank, dtype=torch.float64)
    padded[: branch.dt_rank, : branch.dt_rank] = moment
    rotation = _rotation(recipe.dt_rotation, padded, moments.samples)
    assert rotation is not None
    return rotate.rotate_dt(rotate.pad_dt(branch, rank), rotation)


def _rotation(kind: Rotation, moment: Tensor, samples: int) -> Tensor | None:
    if kind is Rotation.NONE:
        return None
    if kind is Rotation.HADAMARD:
        return rotate.hadamard_for(moment.shape[0], torch.float64, "residual_rotation")
    return rotate.klt_rotation(moment, samples)
