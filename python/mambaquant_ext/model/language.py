"""The float forward pass of a language model made of Mamba blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from mambaquant_ext.model.forward import Tap, block_forward, no_tap
from mambaquant_ext.model.parts import rms_norm
from mambaquant_ext.model.weights import LanguageModelWeights


def language_model_forward(
    weights: LanguageModelWeights,
    input_ids: Tensor,
    taps: Callable[[int], Tap] = lambda _layer: no_tap,
    head_tap: Tap = no_tap,
) -> Tensor:
    """Logits of whole sequences, each from a zero state.

    Args:
        weights: of the model, in the dtype to compute in.
        input_ids: (batch, seqlen), int64.
        taps: the tap of each layer.
        head_tap: sees site "head", (batch, seqlen, hidden), the input of lm_head.

    Returns:
        logits: (batch, seqlen, vocab).
    """
    residual = weights.embedding[input_ids]
    for index, layer in enumerate(weights.layers):
        residual, _ = block_forward(layer, residual, tap=taps(index))
    normed = head_tap("head", rms_norm(residual, weights.norm_f, weights.norm_eps))
    return F.linear(normed, weights.lm_head)
