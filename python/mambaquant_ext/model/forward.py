"""The float forward pass, in plain torch and any floating dtype.

It is the definition that transforms preserve, that calibration observes, and that the emulated mode rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mambaquant_ext.model.weights import LanguageModelWeights, MixerWeights
from mambaquant_ext.ops import hadamard_matrix

# A tap sees, and may replace, the tensor at a named site of a block:
#   in    (batch, seqlen, hidden)      normalised input of in_proj
#   xs, z (batch, seqlen, dim)         conv input; gate before SiLU
#   x     (batch, seqlen, dim)         conv output after SiLU: input of x_proj, the scan and D
#   dt    (batch, seqlen, dt_rank)     input of dt_proj
#   B, C  (batch, seqlen, dstate)      C rotated where the model rotates it
#   h     (seqlen, batch, dim, dstate) state as the read-out sees it, rotated where the model rotates it
#   out   (batch, seqlen, dim)         input of out_proj, rotated where the model rotates it
Tap = Callable[[str, Tensor], Tensor]

# Tokens whose states are materialised at once: bounds memory at batch * SCAN_BLOCK * dim * dstate values.
SCAN_BLOCK = 32


def no_tap(_site: str, value: Tensor) -> Tensor:
    """The tap that does nothing.

    Args:
        value: (...), returned as it is.
    """
    return value


@dataclass(frozen=True, slots=True)
class MixerState:
    """What a block carries from one token to the next.

    Attributes:
        conv: (batch, width - 1, dim), the latest conv inputs, oldest first.
        ssm: (batch, dim, dstate), in the basis of the (possibly smoothed) model.
    """

    conv: Tensor
    ssm: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: (..., hidden).
        weight: (hidden,).
        eps: added to the mean square.
    """
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


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


def mixer_forward(
    weights: MixerWeights,
    hidden_states: Tensor,
    state: MixerState | None = None,
    tap: Tap = no_tap,
    mask: Tensor | None = None,
) -> tuple[Tensor, MixerState]:
    """One block without its residual add: norm, mixer.

    Args:
        weights: of the block, in the dtype to compute in.
        hidden_states: (batch, seqlen, hidden), the residual stream.
        state: from earlier tokens, or None.
        tap: sees, and may replace, the tensors named above.
        mask: (batch, seqlen), bool, False at padding tokens, which then leave every other token alone.

    Returns:
        out: (batch, seqlen, hidden).
        state: after the last token.
    """
    keep = None if mask is None else mask[..., None]
    normed = tap("in", rms_norm(hidden_states, weights.norm_weight, weights.norm_eps))
    xs = tap("xs", F.linear(normed, weights.in_x, weights.in_x_bias))
    z = tap("z", F.linear(normed, weights.in_z, weights.in_z_bias))
    if keep is not None:
        xs = xs * keep
    conv, conv_state = causal_conv(
        xs, weights.conv, weights.conv_bias, None if state is None else state.conv
    )
    x = tap("x", F.silu(conv))
    if keep is not None:
        x = x * keep
    dt = tap("dt", F.linear(x, weights.x_dt, weights.x_dt_bias))
    B = tap("B", F.linear(x, weights.x_B))
    C = tap("C", F.linear(x, weights.x_C))
    delta = F.softplus(F.linear(dt, weights.dt, weights.dt_bias))
    initial = None if state is None else state.ssm
    y, ssm_state = selective_scan(
        x,
        delta,
        weights.A,
        B,
        C,
        weights.D,
        initial,
        rotates_state=weights.has_state_rotation,
        see_state=lambda state: tap("h", state),
    )
    v = y * z * torch.sigmoid(weights.gate_scale * z)
    if weights.has_out_rotation:
        v = v @ hadamard_matrix(weights.dim, v.dtype)
    out = F.linear(tap("out", v), weights.out, weights.out_bias)
    return out, MixerState(conv_state, ssm_state)


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
        residual = residual + mixer_forward(layer, residual, tap=taps(index))[0]
    normed = head_tap("head", rms_norm(residual, weights.norm_f, weights.norm_eps))
    return F.linear(normed, weights.lm_head)
