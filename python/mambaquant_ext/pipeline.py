"""The five stages in a row: calibrate, transform, calibrate again, pack, run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import PackedModel
from mambaquant_ext.calibrate import collect_moments, collect_ranges
from mambaquant_ext.calibrate.collect import (
    block_moments,
    block_ranges,
    token_ids,
)
from mambaquant_ext.config import Fidelity, Recipe, Rotation
from mambaquant_ext.model import LanguageModelWeights
from mambaquant_ext.model.hf import block_weights, language_model_weights
from mambaquant_ext.pack import pack, pack_block
from mambaquant_ext.pack.model import block_options
from mambaquant_ext.run import QuantMambaBlock
from mambaquant_ext.run.swap import swap_
from mambaquant_ext.transform import fold_norm, needs_folded_norms, transform, transform_layer

# Called as progress(stage, done, total) after each batch; stage is "moments" or "ranges".
Progress = Callable[[str, int, int], None]


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """The callback that reports nothing."""


def folded(weights: LanguageModelWeights, recipe: Recipe) -> LanguageModelWeights:
    """The model with its layers' norms folded, if the recipe's transforms expect that."""
    if not needs_folded_norms(recipe):
        return weights
    layers = (fold_norm(layer.to(torch.float64)).to(torch.float32) for layer in weights.layers)
    return weights.replace(layers=tuple(layers))


def provenance_of(batches: list[Tensor], seed: int | None) -> dict[str, Any]:
    """What a checkpoint tells of its calibration data.

    Args:
        batches: of token ids.
        seed: that chose them, if any.

    Returns:
        sha256 over shapes and ids, counts, seed.
    """
    digest = hashlib.sha256()
    for ids in batches:
        digest.update(repr(tuple(ids.shape)).encode())
        digest.update(ids.contiguous().numpy().tobytes())
    return {
        "sha256": digest.hexdigest(),
        "batches": len(batches),
        "sequences": sum(ids.shape[0] for ids in batches),
        "tokens": sum(ids.numel() for ids in batches),
        "seed": seed,
    }


def quantize_weights(
    weights: LanguageModelWeights,
    batches: Iterable[Any],
    recipe: Recipe,
    progress: Progress = no_progress,
    seed: int | None = None,
) -> PackedModel:
    """Calibrates, transforms and packs plain weights.

    Args:
        weights: float32.
        batches: token batches: tensors (batch, seqlen) or (seqlen,), or mappings with "input_ids". All of them
            are kept as token ids, because there are two passes; activations are held for one batch at a time.
        recipe: how.
        progress: called after each batch of each pass.
        seed: recorded with the calibration data.

    Returns:
        The packed model.

    Raises:
        ValueError: no batches, ids outside the vocabulary, activations that are not finite, too few tokens for
            a KLT, or a width without a Hadamard matrix.
        TypeError: batches of another type.
    """
    ids = [token_ids(batch) for batch in batches]
    model = folded(weights, recipe)
    moments = collect_moments(model, ids, lambda done: progress("moments", done, len(ids)))
    model = transform(model, moments, recipe)
    ranges = collect_ranges(model, ids, recipe, lambda done: progress("ranges", done, len(ids)))
    return pack(model, ranges, recipe, provenance_of(ids, seed))


def quantize_(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    fidelity: Fidelity = Fidelity.INTEGER,
    progress: Progress = no_progress,
    seed: int | None = None,
) -> PackedModel:
    """Quantizes a language model in place: every block becomes a QuantMambaBlock, the ends int8 modules.

    The model keeps its class and calling contract, `generate()` included.

    Args:
        model: transformers.MambaForCausalLM, or mamba_ssm's MambaLMHeadModel, on the CPU.
        batches: token batches to calibrate on, see `quantize_weights`.
        recipe: how, for instance `recipe("w8a8")`.
        fidelity: int8 kernels, or their emulation in float.
        progress: called after each batch of each pass.
        seed: recorded with the calibration data.

    Returns:
        The packed model that now runs inside `model`, for `save`.

    Raises:
        ValueError, TypeError: as `quantize_weights`; the model is unchanged then.
    """
    packed = quantize_weights(language_model_weights(model), batches, recipe, progress, seed)
    swap_(model, packed, fidelity)
    return packed


def quantize_block(
    block: nn.Module,
    hidden_states: Iterable[Tensor],
    recipe: Recipe,
    fidelity: Fidelity = Fidelity.INTEGER,
) -> QuantMambaBlock:
    """See QuantMambaBlock.from_float."""
    inputs = list(hidden_states)
    layer = block_weights(block)
    for x in inputs:
        if x.dim() != 3 or x.shape[2] != layer.hidden:
            raise ValueError(
                f"quantize_block: expected inputs of shape (batch, seqlen, {layer.hidden}), got {tuple(x.shape)}"
            )
    recipe = recipe.replace(residual_rotation=Rotation.NONE)
    if needs_folded_norms(recipe):
        layer = fold_norm(layer)
    moments, samples = block_moments(layer, inputs)
    layer = transform_layer(layer.to(torch.float64), moments, samples, recipe, None).to(
        torch.float32
    )
    packed = pack_block(layer, block_ranges(layer, inputs, recipe), recipe)
    layer_idx = int(getattr(block, "layer_idx", 0) or 0)
    return QuantMambaBlock(packed, block_options(layer, recipe), layer_idx, fidelity)
