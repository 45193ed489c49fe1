"""The parts of a block in plain torch and any floating dtype: norms, convolutions, the scan, merges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mambaquant_ext.artifacts.layout import NormKind
from mambaquant_ext.model.weights import ConvWeights, NormWeights
from mambaquant_ext.ops import hadamard_matrix
from mambaquant_ext.routes import Grid

# Tokens whose states are materialised at once: bounds memory at batch * SCAN_BLOCK * dim * dstate values.
SCAN_BLOCK = 32
# Keeps the mean of VARIATION's quotient away from zero.
VARIATION_EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: (..., hidden).
        weight: (hidden,).
        eps: added to the mean square.
    """
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def apply_norm(norm: NormWeights, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension.

    Args:
        norm: of (n,).
        x: (..., n).
    """
    if norm.kind is NormKind.LAYER:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.eps) + norm.bias


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, before SiLU.

    Args:
        x: (batch, seqlen, dim).
        weight: (dim, width).
        bias: (dim,).
        initial: (batch, width - 1, dim), the inputs before x, or None for zeros.

    Returns:
        y: (batch, seqlen, dim).
        final: (batch, width - 1, dim), the last inputs.
    """
    history = weight.shape[1] - 1
    if initial is None:
        initial = x.new_zeros(x.shape[0], history, x.shape[2])
    padded = torch.cat([initial.to(x.dtype), x], 1)
    if x.shape[1] == 0:  # conv1d refuses an input that is narrower than its kernel
        return x, padded
    y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return y, padded[:, padded.shape[1] - history :]


def image_conv(x: Tensor, conv: ConvWeights, grid: Grid) -> tuple[Tensor, Grid]:
    """Depthwise convolution over an image, zero padded by half a kernel, before SiLU.

    Args:
        x: (batch, height * width, dim).
        conv: two-dimensional.
        grid: (height, width).

    Returns:
        y: (batch, tokens, dim).
        grid: of y, smaller with a stride.

    Raises:
        ValueError: a grid that is no image.
    """
    if len(grid) != 2:
        raise ValueError(f"expected a grid (height, width) before a 2-D convolution, got {grid}")
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    padding = tuple(size // 2 for size in conv.weight.shape[1:])
    y = F.conv2d(image, conv.weight[:, None], conv.bias, conv.stride, padding, groups=x.shape[2])
    return y.flatten(2).transpose(1, 2), (y.shape[2], y.shape[3])


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None = None,
    *,
    rotates_state: bool = False,
    see_state: Callable[[Tensor], Tensor] = lambda state: state,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t; y_t = h_t C_t + D x_t (algorithm section 1.1, 6-8).

    Args:
        x: (batch, seqlen, dim).
        delta: (batch, seqlen, dim), after softplus.
        A: (dim, dstate), negative.
        B: (batch, seqlen, dstate).
        C: (batch, seqlen, dstate).
        D: (dim,).
        initial: (batch, dim, dstate) or None for zeros.
        rotates_state: the read-out takes h H, H the Hadamard matrix of the state axis.
        see_state: sees, and may replace, the (rotated) states of a few tokens, (tokens, batch, dim, dstate).

    Returns:
        y: (batch, seqlen, dim).
        final: (batch, dim, dstate).
    """
    batch, seqlen, dim = x.shape
    h = x.new_zeros(batch, dim, B.shape[2]) if initial is None else initial.to(x.dtype)
    rotation = hadamard_matrix(B.shape[2], x.dtype) if rotates_state else None
    # Time first, so that the states of one token are contiguous.
    delta, drive, B, C = (t.transpose(0, 1) for t in (delta, delta * x, B, C))
    blocks = []
    for start in range(0, seqlen, SCAN_BLOCK):
        block = slice(start, min(start + SCAN_BLOCK, seqlen))
        decay = (delta[block, ..., None] * A).exp_()
        states = drive[block, ..., None] * B[block, :, None, :]
        for t in range(len(states)):
            h = states[t].addcmul_(decay[t], h)
        seen = see_state(states if rotation is None else states @ rotation)
        blocks.append((seen @ C[block, ..., None]).squeeze(-1))
    y = torch.cat(blocks).transpose(0, 1) if blocks else torch.zeros_like(x)
    return y + D * x, h.clone()


def upsample(y: Tensor, grid: Grid, target: Grid) -> Tensor:
    """A coarser map at the tokens of a finer grid, bilinear between the centres of the coarse tokens.

    Args:
        y: (batch, tokens, dim) over `grid`.
        grid: (height, width) of y.
        target: (height, width) wanted.
    """
    if grid == target:
        return y
    image = y.unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=target, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)


def excited(y: Tensor, squeeze: Tensor, excite: Tensor) -> Tensor:
    """y * sigmoid(excite relu(squeeze mean y)), the mean over tokens: squeeze and excitation.

    Args:
        y: (batch, tokens, dim).
        squeeze: (excite_dim, dim).
        excite: (dim, excite_dim).
    """
    inner = F.relu(_products(squeeze, y.mean(1)))
    return y * even_sigmoid(_products(excite, inner))[:, None]


def even_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) with bits that depend on x alone.

    torch.sigmoid rounds the last few values of a tensor otherwise than the rest, so that a sample would not have the
    bits that it has in a batch.

    Args:
        x: (...), floating.
    """
    return 1 / (1 + torch.exp(-x))


def _products(weight: Tensor, x: Tensor) -> Tensor:
    """F.linear of a few rows whose bits do not depend on each other, which those of a library's product do.

    Args:
        weight: (n, dim).
        x: (..., dim).

    Returns:
        (..., n).
    """
    return (x[..., None, :] * weight).sum(-1)


def variation_gate(ys: Tensor, threshold: float) -> Tensor:
    """relu(s / (m + eps) - threshold) over routes, s the standard deviation, m the mean of y - min y.

    Args:
        ys: (routes, batch, tokens, dim).
        threshold: below which routes count as equal.

    Returns:
        (batch, tokens, dim). Source: MHS-VM, gated fusion unit.
    """
    above = ys - ys.amin(0)
    return F.relu(ys.std(0) / (above.mean(0) + VARIATION_EPS) - threshold)


def route_shares(vs: Tensor, merge_gate: Tensor) -> Tensor:
    """Softmax over routes of a linear function of the token means: the gate of RSMamba.

    Args:
        vs: (routes, batch, tokens, dim), gated results of the routes.
        merge_gate: (routes, routes, dim), the logit of the first index from the result of the second.

    Returns:
        (routes, batch, 1, 1), summing to 1 over routes.
    """
    means = vs.mean(2)
    logits = sum(_products(merge_gate[:, j], mean) for j, mean in enumerate(means))
    assert isinstance(logits, Tensor)
    return logits.softmax(1).T[..., None, None]
