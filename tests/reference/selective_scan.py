"""What selective_scan computes, in float64 with a loop over time; the rounding of the quantized read-out is in
float32. `precision=torch.float32` makes it the plain torch program that the kernel's error is held against."""

import torch


def hadamard(n):
    """Sylvester's matrix of order n, a power of two, entries +-1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def quantized_state(h, readout_scale, rotate_state):
    """qh of a state h (batch, dstate, dim)."""
    inv_scale = 1.0 / readout_scale
    if rotate_state:
        dstate = h.shape[1]
        h = torch.einsum("bnd,nm->bmd", h, hadamard(dstate).to(h.dtype))
        inv_scale = inv_scale * (1.0 / torch.tensor(float(dstate)).sqrt())
    return torch.round(h.float() * inv_scale).clamp(-127, 127)


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
    precision=torch.float64,
):
    """y in `precision`, and final_state."""

    def real(t, scale=None):
        return t.to(precision) if scale is None else t.to(precision) * scale.to(precision)

    batch, seqlen, dim = x.shape
    x = real(x if x_zero_point is None else x.int() - x_zero_point, x_scale)
    dt = real(dt) if dt_bias is None else real(dt) + real(dt_bias)
    dt = torch.logaddexp(dt, torch.zeros((), dtype=precision))
    B, A = real(B, B_scale), real(A)
    h = torch.zeros(batch, A.shape[0], dim, dtype=precision)
    if initial_state is not None:
        h = real(initial_state)
    y = torch.zeros(batch, seqlen, dim, dtype=precision)
    for t in reversed(range(seqlen)) if reverse else range(seqlen):
        step = dt[:, t, None, :]
        h = torch.exp(step * A) * h + step * x[:, t, None, :] * B[:, t, :, None]
        if readout_scale is None:
            y[:, t] = (h * real(C, C_scale)[:, t, :, None]).sum(1)
        else:
            qh = quantized_state(h, readout_scale, rotate_state)
            acc = (qh.double() * C[:, t, :, None].double()).sum(1)
            y[:, t] = acc.to(precision) * real(readout_scale) * real(C_scale)
    if D is not None:
        y = y + real(D) * x
    if z is not None:
        z = real(z, z_scale)
        y = y * z * torch.sigmoid(z if gate_scale is None else real(gate_scale) * z)
    return y, h
