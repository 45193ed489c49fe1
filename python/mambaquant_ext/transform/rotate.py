"""Rotations, folded offline; the online half (Hadamard before out_proj and on h) is marked on the block.

Row-vector convention: a tensor x becomes x R, the linear behind it W R, the linear before it R^T W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambaquant_ext.artifacts import StreamWrite
from mambaquant_ext.model import BranchWeights, LanguageModelWeights, MixerWeights, NormKind, Skip
from mambaquant_ext.ops import hadamard_matrix, supported_hadamard_sizes

# Fewer samples than this many times the width leave the smallest eigenvectors arbitrary.
SAMPLES_PER_CHANNEL = 4


def hadamard_for(n: int, dtype: torch.dtype, switch: str) -> Tensor:
    """hadamard_matrix, or an error that says which switch of the recipe asks for it.

    Args:
        n: size.
        dtype: of the result.
        switch: name of the recipe's field.

    Raises:
        ValueError: n has no Hadamard matrix.
    """
    try:
        return hadamard_matrix(n, dtype)
    except ValueError as error:
        raise ValueError(f"{error}; turn the recipe's {switch} off") from None


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
    return eigenvectors @ hadamard_for(n, torch.float64, "residual_rotation")


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


def rotate_residual_layer(
    layer: MixerWeights, rotation: Tensor, stream: StreamWrite = StreamWrite.CENTERED
) -> MixerWeights:
    """R1 inside a block: in_proj R, R^T out_proj, for a residual stream that is x R in front of the block.

    RMSNorm without weight commutes with R. LayerNorm does once its mean has been taken out of everything that is
    added to the stream: with P = I - 1 1^T / n, the stream is x P R, the norm becomes RMSNorm, out_proj is centred
    by P, and a normalised skip becomes the matrix R^T diag(gamma) P R (algorithm section 2.3.3, correct form).

    Args:
        layer: with its norm folded.
        rotation: (hidden, hidden), orthogonal.
        stream: what the stream is behind the block.

    Raises:
        ValueError: the norm still has a weight or bias, or there is none; or a plain stream behind a residual skip,
            which carries x R on.
    """
    if layer.norm is None or not layer.norm.is_folded:
        raise ValueError("rotate_residual_layer: expected a block with a folded norm (weight 1)")
    if stream is StreamWrite.PLAIN and layer.skip is Skip.RESIDUAL:
        raise ValueError(
            "rotate_residual_layer: expected a skip that can leave the rotated basis, got residual"
        )
    write = rotation
    if stream is StreamWrite.PLAIN:
        write = torch.eye(layer.hidden, dtype=rotation.dtype)
    elif stream is StreamWrite.CENTERED and layer.norm.kind is NormKind.LAYER:
        write = center(rotation)
    skip_weight, skip_bias = layer.skip_weight, layer.skip_bias
    if layer.skip is Skip.NORMALISED:
        assert skip_weight is not None and skip_bias is not None
        skip_weight = rotation.T @ (skip_weight[:, None] * write)
        skip_bias = skip_bias @ write
    return layer.replace(
        norm=layer.norm.replace(kind=NormKind.RMS),
        in_x=layer.in_x @ rotation,
        in_z=None if layer.in_z is None else layer.in_z @ rotation,
        out=write.T @ layer.out,
        out_bias=layer.out_bias @ write,
        skip_weight=skip_weight,
        skip_bias=skip_bias,
    )


def center(matrix: Tensor) -> Tensor:
    """P M with P = I - 1 1^T / n: what x P M is to x.

    Args:
        matrix: (n, m).
    """
    return matrix - matrix.mean(0)


def rotate_in(layer: MixerWeights) -> MixerWeights:
    """R1 for one block alone: in_proj takes n H, transformed online, n what the norm gives.

    For a residual stream whose other readers and writers cannot be rotated (algorithm section 7.3).

    Args:
        layer: the block, with its norm folded.

    Raises:
        ValueError: rotated already, a norm with a weight, or hidden has no Hadamard matrix.
    """
    if layer.has_in_rotation:
        raise ValueError("rotate_in: expected a block that is not rotated yet")
    if layer.norm is not None and not layer.norm.is_folded:
        raise ValueError("rotate_in: expected a block with a folded norm (weight 1)")
    rotation = hadamard_for(layer.hidden, layer.in_x.dtype, "residual_rotation")
    return layer.replace(
        in_x=layer.in_x @ rotation,
        in_z=None if layer.in_z is None else layer.in_z @ rotation,
        has_in_rotation=True,
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
    rotation = hadamard_for(layer.dim, layer.out.dtype, "out_rotation")
    return layer.replace(out=layer.out @ rotation, has_out_rotation=True)


def rotate_state(layer: MixerWeights) -> MixerWeights:
    """R4: the read-out takes h H and C H on the state axis (algorithm section 2.3.6). After smooth_state.

    Args:
        layer: the block.

    Raises:
        ValueError: rotated already, or a dstate has no Hadamard matrix.
    """
    if layer.has_state_rotation:
        raise ValueError("rotate_state: expected a block that is not rotated yet")

    def rotated(branch: BranchWeights) -> BranchWeights:
        rotation = hadamard_for(branch.dstate, branch.x_C.dtype, "state_rotation")
        return branch.replace(x_C=rotation.T @ branch.x_C)

    return layer.map_branches(rotated).replace(has_state_rotation=True)


def rotatable_rank(dt_rank: int) -> int:
    """The least rank from `dt_rank` up that has a Hadamard matrix; `dt_rank` itself beyond all of them.

    Args:
        dt_rank: at least 1.
    """
    return next((size for size in supported_hadamard_sizes() if size >= dt_rank), dt_rank)


def pad_dt(branch: BranchWeights, dt_rank: int) -> BranchWeights:
    """Widens dt with channels that are zero, up to a rank that has a Hadamard matrix.

    Args:
        branch: of a block.
        dt_rank: at least the branch's.
    """
    extra = dt_rank - branch.dt_rank
    return branch.replace(
        x_dt=F.pad(branch.x_dt, (0, 0, 0, extra)),
        x_dt_bias=F.pad(branch.x_dt_bias, (0, extra)),
        dt=F.pad(branch.dt, (0, extra)),
    )


def rotate_dt(branch: BranchWeights, rotation: Tensor) -> BranchWeights:
    """R5: dt -> dt Q inside the low-rank pair x_proj -> dt_proj (algorithm section 2.3.7).

    Args:
        branch: of a block, after center_dt and smooth_dt.
        rotation: (dt_rank, dt_rank), orthogonal; K H with K from the moment of this branch's dt.
    """
    return branch.replace(
        x_dt=rotation.T @ branch.x_dt,
        x_dt_bias=branch.x_dt_bias @ rotation,
        dt=branch.dt @ rotation,
    )
