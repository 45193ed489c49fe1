"""Rotations, folded offline; the online half (Hadamard before out_proj and on h) is marked on the block.

Row-vector convention: a tensor x becomes x R, the linear behind it W R, the linear before it R^T W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext.model import LanguageModelWeights, MixerWeights
from mambaquant_ext.ops import hadamard_matrix

# Fewer samples than this many times the width leave the smallest eigenvectors arbitrary.
SAMPLES_PER_CHANNEL = 4


def klt_rotation(moment: Tensor, samples: int) -> Tensor:
    """R = K H: eigenvectors of the second moment, then Hadamard.

    Every channel of x R then has mean square trace(moment) / n (paper section 4.2, eq. 13).

    Args:
        moment: (n, n), E[x^T x] not centred, because the quantizer behind it is symmetric.
        samples: rows that the moment was measured on: tokens, times layers for the residual stream.

    Returns:
        (n, n), float64, orthogonal.

    Raises:
        ValueError: too few samples for a full-rank moment, or n has no Hadamard matrix.
    """
    n = moment.shape[0]
    if samples < SAMPLES_PER_CHANNEL * n:
        raise ValueError(
            f"klt_rotation: expected at least {SAMPLES_PER_CHANNEL * n} calibration samples for {n} channels "
            f"(tokens; tokens times layers for the residual stream), "
            f"got {samples}; add calibration data or use Rotation.HADAMARD"
        )
    eigenvectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return eigenvectors @ hadamard_matrix(n)


def rotate_residual_ends(model: LanguageModelWeights, rotation: Tensor) -> LanguageModelWeights:
    """R1 at the embedding and the head: Emb R, lm_head R (algorithm section 2.3.2).

    Args:
        model: with the final norm folded.
        rotation: (hidden, hidden), orthogonal.

    Raises:
        ValueError: the final norm still has a weight.
    """
    if not bool((model.norm_f == 1).all()):
        raise ValueError(
            "rotate_residual_ends: expected a model with a folded final norm (weight 1)"
        )
    return model.replace(embedding=model.embedding @ rotation, lm_head=model.lm_head @ rotation)


def rotate_residual_layer(layer: MixerWeights, rotation: Tensor) -> MixerWeights:
    """R1 inside a block: in_proj R, R^T out_proj. RMSNorm without weight commutes with it.

    Args:
        layer: with its norm folded.
        rotation: (hidden, hidden), orthogonal.

    Raises:
        ValueError: the norm still has a weight.
    """
    if not bool((layer.norm_weight == 1).all()):
        raise ValueError("rotate_residual_layer: expected a block with a folded norm (weight 1)")
    return layer.replace(
        in_x=layer.in_x @ rotation,
        in_z=layer.in_z @ rotation,
        out=rotation.T @ layer.out,
        out_bias=layer.out_bias @ rotation,
    )


def rotate_out(layer: MixerWeights) -> MixerWeights:
    """R2: out_proj takes v H, transformed online (algorithm section 2.3.4). After smooth_gate.

    Args:
        layer: the block.

    Raises:
        ValueError: rotated already, or dim has no Hadamard matrix.
    """
    if layer.has_out_rotation:
        raise ValueError("rotate_out: expected a block that is not rotated yet")
    rotation = hadamard_matrix(layer.dim, layer.out.dtype)
    return layer.replace(out=layer.out @ rotation, has_out_rotation=True)


def rotate_state(layer: MixerWeights) -> MixerWeights:
    """R4: the read-out takes h H and C H on the state axis (algorithm section 2.3.6). After smooth_state.

    Args:
        layer: the block.

    Raises:
        ValueError: rotated already, or dstate has no Hadamard matrix.
    """
    if layer.has_state_rotation:
        raise ValueError("rotate_state: expected a block that is not rotated yet")
    rotation = hadamard_matrix(layer.dstate, layer.x_C.dtype)
    return layer.replace(x_C=rotation.T @ layer.x_C, has_state_rotation=True)


def rotate_dt(layer: MixerWeights, rotation: Tensor) -> MixerWeights:
    """R5: dt -> dt Q inside the low-rank pair x_proj -> dt_proj (algorithm section 2.3.7).

    Args:
        layer: the block, after center_dt and smooth_dt.
        rotation: (dt_rank, dt_rank), orthogonal; K H with K from the moment of this layer's dt.
    """
    return layer.replace(
        x_dt=rotation.T @ layer.x_dt, x_dt_bias=layer.x_dt_bias @ rotation, dt=layer.dt @ rotation
    )
