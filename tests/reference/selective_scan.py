"""What selective_scan computes, in float64 with a loop over time; the rounding of the quantized
read-out is in float32. `precision=torch.float32` makes it the plain torch program that the
kernel's error is held against."""

import torch


def hadamard(n):
    """Sylvester's matrix of order n, a power of two, entries +-1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def rotated(h, norm=True):
    """h H / sqrt(dstate), or h H, of a state (batch, dstate, dim)."""
    dstate = h.shape[1]
    sums = torch.einsum("bnd,nm->bmd", h, hadamard(dstate).to(h.dtype))
    return sums / dstate**0.5 if norm else sums


def quantized_state(h, readout_scale, rotate_state):
    """qh of a state h (batch, dstate, dim)."""
    inv_scale = 1.0 / readout_scale
    if rotate_state:
        inv_scale = inv_scale * (1.0 / torch.tensor(float(h.shape[1])).sqrt())
        h = rotated(h, norm=False)
    return torch.round(h.float() * inv_scale).clamp(-127, 127)


STATE_INPUTS = ["x", "x_scale", "x_zero_point", "dt", "dt_bias", "A", "B", "B_scale"]
STATE_INPUTS += ["initial_state", "reverse", "order"]


def real(t, scale, precision):
    return t.to(precision) if scale is None else t.to(precision) * scale.to(precision)


def walk(seqlen, reverse, order):
    """The tokens in the order in which they are visited."""
    tokens = list(range(seqlen)) if order is None else order.tolist()
    return tokens[::-1] if reverse else tokens


def states(
    x,
    x_scale,
    x_zero_point,
    dt,
    dt_bias,
    A,
    B,
    B_scale,
    initial_state,
    reverse,
    order=None,
    precision=torch.float64,
):
    """The dequantized x, and the state (batch, dstate, dim) after each token, by its place."""
    batch, seqlen, dim = x.shape
    x = real(x if x_zero_point is None else x.int() - x_zero_point, x_scale, precision)
    dt = dt.to(precision) if dt_bias is None else dt.to(precision) + dt_bias.to(precision)
    dt = torch.logaddexp(dt, torch.zeros((), dtype=precision))
    B, A = real(B, B_scale, precision), A.to(precision)
    h = torch.zeros(batch, A.shape[0], dim, dtype=precision)
    if initial_state is not None:
        h = initial_state.to(precision)
    after = [h] * seqlen
    for t in walk(seqlen, reverse, order):
        step = dt[:, t, None, :]
        h = torch.exp(step * A) * h + step * x[:, t, None, :] * B[:, t, :, None]
        after[t] = h
    return x, after


def read_out(h, C, C_scale, readout_scale, rotate_state):
    """y (batch, dim) of one token, before skip and gate; C (batch, dstate)."""
    if readout_scale is None:
        return (h * real(C, C_scale, h.dtype)[..., None]).sum(1)
    qh = quantized_state(h, readout_scale, rotate_state)
    acc = (qh.double() * C[..., None].double()).sum(1)
    return acc.to(h.dtype) * readout_scale.to(h.dtype) * C_scale.to(h.dtype)


def selective_scan(
    x,
    x_scale,
    x_zero_point,
    dt,
    dt_bias,
    A,
    B,
    B_scale,
    C,
    C_scale,
    D=None,
    z=None,
    z_scale=None,
    gate_scale=None,
    readout_scale=None,
    rotate_state=False,
    initial_state=None,
    reverse=False,
    order=None,
    addend=None,
    precision=torch.float64,
):
    """y in `precision`, and final_state."""
    inputs = (x, x_scale, x_zero_point, dt, dt_bias, A, B, B_scale)
    x_f, after = states(*inputs, initial_state, reverse, order, precision)
    y = torch.zeros(x.shape, dtype=precision)
    for t, h in enumerate(after):
        y[:, t] = read_out(h, C[:, t], C_scale, readout_scale, rotate_state)
    if D is not None:
        y = y + D.to(precision) * x_f
    if addend is not None:
        y = y + addend.to(precision)
    if z is not None:
        z = real(z, z_scale, precision)
        y = y * z * torch.sigmoid(z if gate_scale is None else gate_scale.to(precision) * z)
    if after:
        return y, after[walk(len(after), reverse, order)[-1]]
    shape = (x.shape[0], A.shape[0], x.shape[2])
    return y, torch.zeros(shape) if initial_state is None else initial_state.to(precision)
