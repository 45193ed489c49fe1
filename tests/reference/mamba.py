"""What a Mamba-1 language model computes, in float64: algorithm sections 1.1 and 1.2, one loop per index.

`weights` is any object with the fields named here; the transforms' hooks are part of the meaning:
gate_scale (S-SiLU, 2.2.1), has_in_rotation (R1 of one block alone, 7.3), has_out_rotation (R2, 2.3.4),
has_state_rotation (R4, 2.3.6).
"""

import math

import torch

from reference import hadamard


def rms(x, weight, eps):
    """(hidden,) -> (hidden,)."""
    return x / math.sqrt(float(x @ x) / len(x) + eps) * weight


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def softplus(x):
    return torch.maximum(x, torch.zeros_like(x)) + torch.log1p(torch.exp(-x.abs()))


def mixer(w, tokens, initial_state=None):
    """One block on one sequence, without the residual add.

    tokens: (seqlen, hidden). initial_state: (dim, dstate) or None.
    Returns out (seqlen, hidden); v (seqlen, dim), the input of out_proj before R2; h (seqlen, dim, dstate).
    """
    dim, width = w.conv.shape
    dstate = w.A.shape[1]
    h = torch.zeros(dim, dstate, dtype=torch.float64) if initial_state is None else initial_state
    rows = [rms(token, w.norm_weight, w.norm_eps) for token in tokens]
    if w.has_in_rotation:
        rows = [row @ hadamard.matrix(len(row)) for row in rows]
    xs = [w.in_x @ row + w.in_x_bias for row in rows]
    z = [w.in_z @ row + w.in_z_bias for row in rows]
    outs, vs, states = [], [], []
    for t in range(len(tokens)):
        conv = w.conv_bias.clone()
        for tap in range(width):
            past = t - (width - 1) + tap
            if past >= 0:
                conv = conv + w.conv[:, tap] * xs[past]
        u = conv * sigmoid(conv)
        dt, B, C = w.x_dt @ u + w.x_dt_bias, w.x_B @ u, w.x_C @ u
        delta = softplus(w.dt @ dt + w.dt_bias)
        h = torch.stack(
            [torch.exp(delta * w.A[:, n]) * h[:, n] + delta * B[n] * u for n in range(dstate)],
            1,
        )
        seen = h @ hadamard.matrix(dstate) if w.has_state_rotation else h
        y = w.D * u
        for n in range(dstate):
            y = y + seen[:, n] * C[n]
        v = y * (z[t] * sigmoid(w.gate_scale * z[t]))
        rotated = v @ hadamard.matrix(dim) if w.has_out_rotation else v
        outs.append(w.out @ rotated + w.out_bias)
        vs.append(v)
        states.append(h)
    return torch.stack(outs), torch.stack(vs), torch.stack(states)


def language_model(w, ids):
    """Logits of one sequence, and the residual stream at every layer.

    ids: list of int.
    Returns logits (seqlen, vocab); residuals, one (seqlen, hidden) before each block and one after the last.
    """
    residual = torch.stack([w.embedding[token] for token in ids])
    residuals = [residual]
    for layer in w.layers:
        residual = residual + mixer(layer, residual)[0]
        residuals.append(residual)
    logits = [w.lm_head @ rms(token, w.norm_f, w.norm_eps) for token in residual]
    return torch.stack(logits), residuals
