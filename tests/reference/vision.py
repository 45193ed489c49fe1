"""What vision blocks compute, in float64 and in storage order: algorithm sections 1.1, 1.3 and 1.4.

No token is ever moved. A walk is a list of token indices, first to last; the scan is written as its closed form,
a sum over all earlier tokens of the walk. `p` maps the public parameter names of a mixer to tensors; `suffix` is
"" or "_b".
"""

import torch

from reference.mamba import sigmoid, softplus


def layer_norm(x, weight, bias, eps):
    """(..., hidden) -> (..., hidden)."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def affine(p, name, rows):
    """(tokens, in) -> (tokens, out), with the bias if there is one."""
    out = rows @ p[f"{name}.weight"].T
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def scan_inputs(p, suffix, xs, walk):
    """xs (seqlen, dim) -> u, delta (seqlen, dim), B, C (seqlen, dstate); the convolution goes along the walk."""
    taps = p[f"conv1d{suffix}.weight"][:, 0]
    u = torch.zeros_like(xs)
    for step, token in enumerate(walk):
        for back in range(min(step + 1, taps.shape[1])):
            u[token] += taps[:, taps.shape[1] - 1 - back] * xs[walk[step - back]]
    u = u + p.get(f"conv1d{suffix}.bias", 0)
    u = u * sigmoid(u)
    rank = p[f"dt_proj{suffix}.weight"].shape[1]
    rows = affine(p, f"x_proj{suffix}", u)
    dstate = (rows.shape[1] - rank) // 2
    dt, B, C = rows[:, :rank], rows[:, rank : rank + dstate], rows[:, rank + dstate :]
    return u, softplus(affine(p, f"dt_proj{suffix}", dt)), B, C


def scan(inputs, A, D, walk):
    """y_t = sum over s up to t of C_t exp(A (delta_{s+1} + ... + delta_t)) B_s delta_s u_s, and D u_t."""
    u, delta, B, C = inputs
    y = D * u
    for step, token in enumerate(walk):
        elapsed = torch.zeros(u.shape[1], dtype=u.dtype)
        for past in reversed(walk[: step + 1]):
            decay = torch.exp(A * elapsed[:, None])
            y[token] += (decay @ (C[token] * B[past])) * delta[past] * u[past]
            elapsed = elapsed + delta[past]
    return y


def gated(p, rows, mix):
    """in_proj, `mix` on the half that is scanned, the gate, out_proj: (seqlen, hidden) -> (seqlen, hidden)."""
    xs, z = affine(p, "in_proj", rows).chunk(2, -1)
    return affine(p, "out_proj", mix(xs) * z * sigmoid(z))


def mamba_mixer(p, rows, walk):
    """A Mamba-1 mixer along one walk."""
    A = -torch.exp(p["A_log"])
    return gated(p, rows, lambda xs: scan(scan_inputs(p, "", xs, walk), A, p["D"], walk))


def vim_mixer(p, rows, bimamba_type, takes_mean):
    """A Vim mixer of type "none", "v1" or "v2"."""
    there = list(range(len(rows)))
    back = there[::-1]
    if bimamba_type == "none":
        return mamba_mixer(p, rows, there)

    def mix(xs):
        inputs = scan_inputs(p, "", xs, there)
        y = scan(inputs, -torch.exp(p["A_log"]), p["D"], there)
        A = -torch.exp(p["A_b_log"])
        if bimamba_type == "v1":
            return y + scan(inputs, A, p["D"], back)
        y = y + scan(scan_inputs(p, "_b", xs, back), A, p["D_b"], back)
        return y / 2 if takes_mean else y

    return gated(p, rows, mix)
