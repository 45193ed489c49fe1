"""From transformed float blocks and their ranges to packed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mambaquant_ext.artifacts import (
    BlockLayout,
    BranchLayout,
    ConvLayout,
    PackedBlock,
    PackedBranch,
    PackedConv,
    PackedHead,
    PackedLinear,
    Range,
    RangeStats,
)
from mambaquant_ext.config import Recipe
from mambaquant_ext.model import BranchWeights, ConvWeights, LanguageModelWeights, MixerWeights
from mambaquant_ext.model.weights import map_tensors
from mambaquant_ext.pack.weights import asymmetric_scale, quantize_weight, symmetric_scale

Ranges = Mapping[str, Range]


def pack_blocks(
    layers: Sequence[MixerWeights], ranges: RangeStats, recipe: Recipe
) -> tuple[PackedBlock, ...]:
    """Quantizes every weight and fixes every activation scale of a model's blocks.

    Args:
        layers: transformed, float32.
        ranges: of these very blocks.
        recipe: bits and switches.

    Returns:
        Tensors that no longer need the float model.

    Raises:
        ValueError: weights that are not finite, or ranges of another number of layers.
    """
    if len(ranges.layers) != len(layers):
        raise ValueError(f"pack: expected ranges of {len(layers)} layers, got {len(ranges.layers)}")
    return tuple(
        pack_block(layer, sites, recipe) for layer, sites in zip(layers, ranges.layers, strict=True)
    )


def block_layout(layer: MixerWeights, recipe: Recipe) -> BlockLayout:
    """What the tensors of a block do not tell.

    Args:
        layer: transformed.
        recipe: bits and level.

    Raises:
        ValueError: parts that do not fit together.
    """
    convs = tuple(
        ConvLayout(
            kernel=tuple(conv.weight.shape[1:]), stride=conv.stride, along_route=conv.along_route
        )
        for conv in layer.convs
    )
    branches = tuple(
        BranchLayout(
            dim=branch.dim,
            dstate=branch.dstate,
            dt_rank=branch.dt_rank,
            conv=branch.conv,
            first_channel=branch.first_channel,
        )
        for branch in layer.branches
    )
    norm, out_norm = layer.norm, layer.out_norm
    return BlockLayout(
        hidden=layer.hidden,
        dim=layer.dim,
        norm=None if norm is None else norm.kind,
        norm_eps=0.0 if norm is None else norm.eps,
        has_gate=layer.in_z is not None,
        convs=convs,
        branches=branches,
        routes=layer.routes,
        merge=layer.merge,
        merge_threshold=layer.merge_threshold,
        out_norm=None if out_norm is None else out_norm.kind,
        out_norm_eps=0.0 if out_norm is None else out_norm.eps,
        excite_dim=layer.excite_dim,
        skip=layer.skip,
        has_skip_matrix=layer.skip_weight is not None and layer.skip_weight.dim() == 2,
        class_token=layer.class_token,
        has_in_rotation=layer.has_in_rotation,
        has_out_rotation=layer.has_out_rotation,
        has_state_rotation=layer.has_state_rotation,
        quantize_readout=recipe.quantize_readout,
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        gate_bits=recipe.gate_bits,
    )


def pack_block(layer: MixerWeights, ranges: Ranges, recipe: Recipe) -> PackedBlock:
    """One block.

    Args:
        layer: transformed, float32.
        ranges: by site, see mambaquant_ext.model.forward.Tap.
        recipe: bits.

    Returns:
        Tensors of the shapes and dtypes of BlockLayout.expected().

    Raises:
        ValueError: weights that are not finite.
    """
    bits, dim = recipe.activation_bits, layer.dim
    rows, biases = [layer.in_x], [layer.in_x_bias]
    xz_scale = [symmetric_scale(ranges["xs"], bits, layer.in_x.shape[0])]
    if layer.in_z is not None and layer.in_z_bias is not None:
        rows.append(layer.in_z)
        biases.append(layer.in_z_bias)
        xz_scale.append(symmetric_scale(ranges["z"], recipe.gate_bits, dim))
    in_proj, in_proj_scale = quantize_weight(torch.cat(rows), recipe.weight_bits)
    out_proj, out_proj_scale = quantize_weight(layer.out, recipe.weight_bits)
    convs = tuple(
        _pack_conv(conv, ranges[f"x.{index}"], recipe) for index, conv in enumerate(layer.convs)
    )
    branches = tuple(
        _pack_branch(
            branch,
            index,
            xz_scale[0] if branch.conv is None else convs[branch.conv].x_scale,
            ranges,
            recipe,
        )
        for index, branch in enumerate(layer.branches)
    )
    norm, out_norm = layer.norm, layer.out_norm
    block = PackedBlock(
        layout=block_layout(layer, recipe),
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        in_scale=symmetric_scale(ranges["in"], bits, 1),
        in_proj=in_proj,
        in_proj_scale=in_proj_scale,
        in_proj_bias=torch.cat(biases),
        xz_scale=torch.cat(xz_scale),
        convs=convs,
        branches=branches,
        merge_gate=layer.merge_gate,
        out_norm_weight=None if out_norm is None else out_norm.weight,
        out_norm_bias=None if out_norm is None else out_norm.bias,
        squeeze=layer.squeeze,
        excite=layer.excite,
        gate_scale=layer.gate_scale,
        skip_weight=layer.skip_weight,
        skip_bias=layer.skip_bias,
        out_proj=out_proj,
        out_proj_scale=out_proj_scale,
        out_proj_bias=layer.out_bias,
        out_scale=symmetric_scale(ranges["out"], bits, 1),
        class_out_scale=None
        if layer.class_token is None
        else symmetric_scale(ranges["out.class"], bits, 1),
    )
    _check_finite(block.tensors())
    return map_tensors(
        block, lambda t: t.float().contiguous() if t.is_floating_point() else t.contiguous()
    )


def _pack_conv(conv: ConvWeights, x: Range, recipe: Recipe) -> PackedConv:
    dim = conv.weight.shape[0]
    weight, scale = quantize_weight(conv.weight.flatten(1), recipe.weight_bits)
    x_scale, x_zero_point = asymmetric_scale(x, recipe.activation_bits, dim)
    return PackedConv(
        weight=weight.view(conv.weight.shape).movedim(0, -1),
        weight_scale=scale,
        bias=conv.bias,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
    )


def _pack_branch(
    branch: BranchWeights, index: int, x_scale: Tensor, ranges: Ranges, recipe: Recipe
) -> PackedBranch:
    # x_proj reads x, whose int8 scale is static: x_proj's columns absorb it, so that a scale per channel costs nothing
    # at run time and the product needs no activation scale.
    bits = recipe.activation_bits
    x_proj, x_proj_scale = quantize_weight(
        torch.cat([branch.x_dt, branch.x_B, branch.x_C]) * x_scale[branch.channels],
        recipe.weight_bits,
    )
    dt_proj, dt_proj_scale = quantize_weight(branch.dt, recipe.weight_bits)
    dtBC_scale = [
        symmetric_scale(ranges[f"dt.{index}"], bits, branch.dt_rank),
        symmetric_scale(ranges[f"B.{index}"], bits, branch.dstate),
        symmetric_scale(ranges[f"C.{index}"], bits, branch.dstate),
    ]
    zeros = torch.zeros(2 * branch.dstate, dtype=branch.x_dt_bias.dtype)
    return PackedBranch(
        x_proj=x_proj,
        x_proj_scale=x_proj_scale,
        x_proj_bias=torch.cat([branch.x_dt_bias, zeros]),
        dtBC_scale=torch.cat(dtBC_scale),
        dt_proj=dt_proj,
        dt_proj_scale=dt_proj_scale,
        dt_bias=branch.dt_bias,
        A=branch.A.T,
        D=branch.D,
        readout_scale=symmetric_scale(ranges[f"h.{index}"], bits, branch.dim)
        if recipe.quantize_readout
        else torch.ones(branch.dim),
    )


def pack_head(model: LanguageModelWeights, head: Range | None, recipe: Recipe) -> PackedHead:
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
    if recipe.quantize_head:
        assert head is not None
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


def pack_linear(weight: Tensor, bias: Tensor | None, x: Range, recipe: Recipe) -> PackedLinear:
    """A linear layer outside the blocks.

    Args:
        weight: (N, K), float32.
        bias: (N,), float32, or None.
        x: range of its input.
        recipe: bits.

    Raises:
        ValueError: weights that are not finite.
    """
    q, scale = quantize_weight(weight, recipe.weight_bits)
    packed = PackedLinear(
        weight=q,
        weight_scale=scale,
        bias=torch.zeros(len(scale)) if bias is None else bias.float(),
        in_scale=symmetric_scale(x, recipe.activation_bits, 1),
    )
    _check_finite({"weight_scale": scale, "bias": packed.bias})
    return packed


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"pack: expected finite weights, got inf or NaN in {name}")
