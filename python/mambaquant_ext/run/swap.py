"""Puts the modules of a packed model into the place of a float model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import PackedModel
from mambaquant_ext.config import Fidelity
from mambaquant_ext.model.hf import embedding_name, norm_parts
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
    """Replaces blocks, embedding, final norm weight and head in place.

    Args:
        model: whose float weights the packed model was made from, or an empty model of the same shape.
        packed: to run.
        fidelity: int8 kernels or their emulation.

    Raises:
        ValueError: fewer than 8 bits with Fidelity.INTEGER, or a model of other sizes; the model is unchanged.
    """
    m: Any = model
    backbone = m.backbone
    if len(backbone.layers) != len(packed.blocks):
        raise ValueError(f"swap_: expected {len(packed.blocks)} layers, got {len(backbone.layers)}")
    is_mamba_ssm = not hasattr(backbone, "embeddings")
    table, expected = (
        getattr(backbone, embedding_name(backbone)).weight.shape,
        packed.head.embedding.shape,
    )
    if table != expected:
        raise ValueError(
            f"swap_: expected an embedding of shape (vocab, hidden) {tuple(expected)}, got {tuple(table)}"
        )
    _, eps = norm_parts(backbone.norm_f, "backbone.norm_f")
    blocks: list[nn.Module] = [
        QuantMambaBlock(block, packed.options, index, fidelity)
        for index, block in enumerate(packed.blocks)
    ]
    if is_mamba_ssm:
        blocks = [
            QuantMambaSsmBlock(block) for block in blocks if isinstance(block, QuantMambaBlock)
        ]
    head = QuantLinear(packed.head, packed.options.activation_bits, fidelity is Fidelity.EMULATED)
    backbone.layers = nn.ModuleList(blocks)
    setattr(backbone, embedding_name(backbone), QuantEmbedding(packed.head))
    backbone.norm_f = FinalNorm(packed.head.norm_f, eps)
    if is_mamba_ssm:
        backbone.fused_add_norm = False  # or its forward calls a GPU kernel in place of norm_f
    m.lm_head = head
    if hasattr(m.config, "tie_word_embeddings"):
        m.config.tie_word_embeddings = False  # the head carries norm_f and its own scales now
    model.eval()
