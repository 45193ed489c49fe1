"""Puts the modules of a packed model into the place of a float model's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import PackedHead, PackedModel
from mambaquant_ext.artifacts.packed import HEAD_WEIGHT, LINEAR_WEIGHT
from mambaquant_ext.config import Fidelity, Rotation
from mambaquant_ext.model.adapters import adapter
from mambaquant_ext.model.hf import embedding_name, norm_parts
from mambaquant_ext.model.sites import CalledBlock, Contract, replace_module
from mambaquant_ext.routes import Grid
from mambaquant_ext.run.block import QuantMambaBlock
from mambaquant_ext.run.cache import StateDict
from mambaquant_ext.run.modules import FinalNorm, QuantEmbedding, QuantLinear


class QuantMambaSsmBlock(nn.Module):
    """QuantMambaBlock behind the calling contract of mamba_ssm.modules.block.Block."""

    def __init__(self, block: QuantMambaBlock) -> None:
        """Wraps."""
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """mamba_ssm's add, norm, mixer.

        Args:
            hidden_states: (batch, seqlen, hidden), the previous mixer's output.
            residual: (batch, seqlen, hidden), the stream before it, or None.
            inference_params: mamba_ssm's InferenceParams, whose key_value_memory_dict holds the states.

        Returns:
            The stream after this block, in two parts: zeros, and the sum.
        """
        stream = hidden_states if residual is None else hidden_states + residual
        cache = None
        if inference_params is not None:
            if int(inference_params.seqlen_offset) == 0:
                inference_params.key_value_memory_dict.pop(self.block.layer_idx, None)
            cache = StateDict(inference_params.key_value_memory_dict)
        stream = self.block(stream, cache)
        return torch.zeros_like(stream), stream


def swap_(model: nn.Module, packed: PackedModel, fidelity: Fidelity) -> None:
    """Replaces what a packed model holds in place: blocks, and the ends around them.

    Args:
        model: whose float weights the packed model was made from, or an empty model of the same shape.
        packed: to run.
        fidelity: int8 kernels or their emulation.

    Raises:
        ValueError: fewer than 8 bits with Fidelity.INTEGER, or a model of other sizes; the model is unchanged.
    """
    if packed.head is None:
        _swap_blocks(model, packed, fidelity)
    else:
        _swap_language_model(model, packed, packed.head, fidelity)
    model.eval()


class QuantCalledBlock(CalledBlock):
    """QuantMambaBlock behind the calling contract of the module that it replaces."""

    def __init__(self, block: QuantMambaBlock, contract: Contract) -> None:
        """Wraps."""
        super().__init__(contract)
        self.block = block

    def tokens_forward(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        """See CalledBlock. What surrounds the block may be of another dtype: it gets back what it gave."""
        out: Tensor = self.block(hidden_states, grid=grid)
        return out.to(hidden_states.dtype)


def _blocks(packed: PackedModel, fidelity: Fidelity) -> list[QuantMambaBlock]:
    return [
        QuantMambaBlock(block, index, fidelity, packed.kernel_weights_of(index))
        for index, block in enumerate(packed.blocks)
    ]


def _swap_blocks(model: nn.Module, packed: PackedModel, fidelity: Fidelity) -> None:
    known = adapter(packed.adapter)
    sites = known.sites(model)
    names = tuple(site.name for site in sites)
    if names != packed.names:
        raise ValueError(
            f"swap_: expected a model with Mamba blocks {', '.join(packed.names)}, got {', '.join(names) or 'none'}"
        )
    blocks = _blocks(packed, fidelity)
    _check_surroundings(model, packed)
    rotation = packed.recipe.residual_rotation
    if rotation is not Rotation.NONE and known.rotates_stream(model, rotation):
        known.prepare_rotated(model)
    for name, tensor in packed.surroundings.items():
        _set_tensor(model, name, tensor)
    for site, block in zip(sites, blocks, strict=True):
        site.replace_in(model, QuantCalledBlock(block, site.contract))
    if packed.linear_name is not None and packed.linear is not None:
        linear = QuantLinear(
            packed.linear.weight,
            packed.linear.weight_scale,
            packed.linear.bias,
            packed.linear.in_scale,
            packed.recipe.activation_bits,
            fidelity is Fidelity.EMULATED,
            packed.kernel_weights.get(LINEAR_WEIGHT),
        )
        replace_module(model, packed.linear_name, linear)


def _check_surroundings(model: nn.Module, packed: PackedModel) -> None:
    """The tensors around the blocks have the shapes that the model has there, and float32 where it has floats."""
    own = model.state_dict()
    for name, tensor in packed.surroundings.items():
        if name not in own or own[name].shape != tensor.shape:
            got = tuple(own[name].shape) if name in own else "no such tensor"
            raise ValueError(
                f"swap_: {name}: expected a model with shape {tuple(tensor.shape)} there, got {got}"
            )
        dtype = torch.float32 if own[name].is_floating_point() else own[name].dtype
        if tensor.dtype != dtype:
            raise ValueError(f"swap_: {name}: expected {dtype}, got {tensor.dtype}")


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter or buffer, on whatever device it was."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor.clone(), requires_grad=False)
    else:
        owner._buffers[leaf] = tensor.clone()


def bare_language_model(packed: PackedModel, fidelity: Fidelity = Fidelity.INTEGER) -> nn.Module:
    """The quantized modules of a language model under their usual names, without a library's model around them.

    It has no forward of its own: a LanguageRunner runs it.

    Args:
        packed: with a head.
        fidelity: int8 kernels or their emulation.

    Raises:
        ValueError: a packed model without a head, or as swap_.
    """
    if packed.head is None:
        raise ValueError(f"expected a language model, got one of adapter {packed.adapter!r}")
    vocab, hidden = packed.head.embedding.shape
    # Of any attributes, which nn.Module does not declare.
    model: Any = nn.Module()
    backbone: Any = nn.Module()
    # Given a weight, the module draws none: a random one without storage would import torch's compiler.
    table = torch.empty(vocab, hidden, device="meta")
    backbone.embeddings = nn.Embedding.from_pretrained(table)
    backbone.norm_f = nn.RMSNorm(hidden, packed.blocks[0].layout.norm_eps)
    backbone.layers = nn.ModuleList(nn.Identity() for _ in packed.blocks)
    model.backbone = backbone
    model.config = SimpleNamespace(vocab_size=vocab, hidden_size=hidden)
    swap_(model, packed, fidelity)
    made: nn.Module = model
    return made


def _swap_language_model(
    model: nn.Module, packed: PackedModel, head: PackedHead, fidelity: Fidelity
) -> None:
    """Replaces blocks, embedding, final norm weight and head in place."""
    m: Any = model
    backbone = m.backbone
    if len(backbone.layers) != len(packed.blocks):
        raise ValueError(f"swap_: expected {len(packed.blocks)} layers, got {len(backbone.layers)}")
    is_mamba_ssm = not hasattr(backbone, "embeddings")
    table, expected = (
        getattr(backbone, embedding_name(backbone)).weight.shape,
        head.embedding.shape,
    )
    if table != expected:
        raise ValueError(
            f"swap_: expected an embedding of shape (vocab, hidden) {tuple(expected)}, got {tuple(table)}"
        )
    _, eps = norm_parts(backbone.norm_f, "backbone.norm_f")
    blocks = _blocks(packed, fidelity)
    lm_head = QuantLinear(
        head.lm_head,
        head.lm_head_scale,
        in_scale=head.head_scale,
        activation_bits=packed.recipe.activation_bits,
        emulated=fidelity is Fidelity.EMULATED,
        made=packed.kernel_weights.get(HEAD_WEIGHT),
    )
    backbone.layers = nn.ModuleList(map(QuantMambaSsmBlock, blocks) if is_mamba_ssm else blocks)
    setattr(backbone, embedding_name(backbone), QuantEmbedding(head))
    backbone.norm_f = FinalNorm(head.norm_f, eps)
    if is_mamba_ssm:
        backbone.fused_add_norm = False  # or its forward calls a GPU kernel in place of norm_f
    m.lm_head = lm_head
    if hasattr(m.config, "tie_word_embeddings"):
        m.config.tie_word_embeddings = False  # the head carries norm_f and its own scales now
