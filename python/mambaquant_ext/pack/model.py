"""From a transformed float model and its ranges to a PackedModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext.artifacts import (
    BlockOptions,
    PackedBlock,
    PackedHead,
    PackedModel,
    Range,
    RangeStats,
)
from mambaquant_ext.config import Recipe
from mambaquant_ext.model import LanguageModelWeights, MixerWeights
from mambaquant_ext.pack.weights import asymmetric_scale, quantize_weight, symmetric_scale


def pack(
    model: LanguageModelWeights, ranges: RangeStats, recipe: Recipe, provenance: Mapping[str, Any]
) -> PackedModel:
    """Quantizes every weight and fixes every activation scale.

    Args:
        model: transformed, float32.
        ranges: of this very model.
        recipe: bits and switches.
        provenance: of the calibration data, kept as it is.

    Returns:
        Tensors that no longer need the float model.

    Raises:
        ValueError: weights that are not finite, or ranges of another number of layers.
    """
    if len(ranges.layers) != len(model.layers):
        raise ValueError(
            f"pack: expected ranges of {len(model.layers)} layers, got {len(ranges.layers)}"
        )
    blocks = tuple(
        pack_block(layer, sites, recipe)
        for layer, sites in zip(model.layers, ranges.layers, strict=True)
    )
    return PackedModel(
        blocks=blocks,
        options=block_options(model.layers[0], recipe),
        head=pack_head(model, ranges.head, recipe),
        recipe=recipe,
        provenance=dict(provenance),
    )


def block_options(layer: MixerWeights, recipe: Recipe) -> BlockOptions:
    """What the tensors of a block do not tell.

    Args:
        layer: transformed.
        recipe: bits and level.
    """
    return BlockOptions(
        norm_eps=layer.norm_eps,
        has_out_rotation=layer.has_out_rotation,
        has_state_rotation=layer.has_state_rotation,
        quantize_readout=recipe.quantize_readout,
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        gate_bits=recipe.gate_bits,
    )


def pack_block(layer: MixerWeights, ranges: Mapping[str, Range], recipe: Recipe) -> PackedBlock:
    """One block.

    x_proj reads the conv's output, whose int8 scale is static: x_proj's columns absorb it, so that a scale per
    channel costs nothing at run time and the product needs no activation scale.

    Args:
        layer: transformed, float32.
        ranges: by site, see mambaquant_ext.model.forward.Tap.
        recipe: bits.

    Returns:
        Tensors of the shapes and dtypes of BlockSizes.expected().

    Raises:
        ValueError: weights that are not finite.
    """
    bits, dim, dstate = recipe.activation_bits, layer.dim, layer.dstate
    in_proj, in_proj_scale = quantize_weight(
        torch.cat([layer.in_x, layer.in_z]), recipe.weight_bits
    )
    conv, conv_scale = quantize_weight(layer.conv, recipe.weight_bits)
    x_scale, x_zero_point = asymmetric_scale(ranges["x"], bits, dim)
    x_proj, x_proj_scale = quantize_weight(
        torch.cat([layer.x_dt, layer.x_B, layer.x_C]) * x_scale, recipe.weight_bits
    )
    dt_proj, dt_proj_scale = quantize_weight(layer.dt, recipe.weight_bits)
    out_proj, out_proj_scale = quantize_weight(layer.out, recipe.weight_bits)
    xz_scale = [
        symmetric_scale(ranges["xs"], bits, dim),
        symmetric_scale(ranges["z"], recipe.gate_bits, dim),
    ]
    dtBC_scale = [
        symmetric_scale(ranges["dt"], bits, layer.dt_rank),
        symmetric_scale(ranges["B"], bits, dstate),
        symmetric_scale(ranges["C"], bits, dstate),
    ]
    zeros = torch.zeros(2 * dstate, dtype=layer.x_dt_bias.dtype)
    tensors: dict[str, Tensor] = {
        "norm_weight": layer.norm_weight,
        "in_scale": symmetric_scale(ranges["in"], bits, 1),
        "in_proj": in_proj,
        "in_proj_scale": in_proj_scale,
        "in_proj_bias": torch.cat([layer.in_x_bias, layer.in_z_bias]),
        "xz_scale": torch.cat(xz_scale),
        "conv": conv.T.contiguous(),
        "conv_scale": conv_scale,
        "conv_bias": layer.conv_bias,
        "x_scale": x_scale,
        "x_zero_point": x_zero_point,
        "x_proj": x_proj,
        "x_proj_scale": x_proj_scale,
        "x_proj_bias": torch.cat([layer.x_dt_bias, zeros]),
        "dtBC_scale": torch.cat(dtBC_scale),
        "dt_proj": dt_proj,
        "dt_proj_scale": dt_proj_scale,
        "dt_bias": layer.dt_bias,
        "A": layer.A.T.contiguous(),
        "D": layer.D,
        "gate_scale": layer.gate_scale,
        "readout_scale": symmetric_scale(ranges["h"], bits, dim)
        if recipe.quantize_readout
        else torch.ones(dim),
        "out_proj": out_proj,
        "out_proj_scale": out_proj_scale,
        "out_proj_bias": layer.out_bias,
        "out_scale": symmetric_scale(ranges["out"], bits, 1),
    }
    _check_finite(tensors)
    floats = {k: v.float().contiguous() for k, v in tensors.items() if v.is_floating_point()}
    return PackedBlock(**{**tensors, **floats})


def pack_head(model: LanguageModelWeights, head: Range, recipe: Recipe) -> PackedHead:
    """Embedding and lm_head.

    Args:
        model: transformed, float32.
        head: range of lm_head's input.
        recipe: bits, and which of the two become int8.

    Raises:
        ValueError: weights that are not finite, in float16 for an embedding that is not quantized.
    """
    embedding, embedding_scale = model.embedding.to(torch.float16), None
    if recipe.quantize_embedding:
        # A table look-up is weight-only quantization: 8 bits a value, whatever the matrix products use.
        embedding, embedding_scale = quantize_weight(model.embedding, 8)
    lm_head, lm_head_scale, head_scale = model.lm_head.float(), None, None
    if recipe.quantize_lm_head:
        lm_head, lm_head_scale = quantize_weight(model.lm_head, recipe.weight_bits)
        head_scale = symmetric_scale(head, recipe.activation_bits, 1)
    packed = PackedHead(
        embedding=embedding,
        embedding_scale=embedding_scale,
        norm_f=model.norm_f.float(),
        lm_head=lm_head,
        lm_head_scale=lm_head_scale,
        head_scale=head_scale,
    )
    _check_finite(packed.tensors())
    return packed


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"pack: expected finite weights, got inf or NaN in {name}")
