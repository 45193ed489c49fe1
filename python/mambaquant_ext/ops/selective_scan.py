"""Mamba's selective scan over int8 operands with a float32 state (mixer steps 5 to 9)."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    z_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    readout_scale: Tensor | None = None,
    *,
    rotate_state: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    order: Tensor | None = None,
    addend: Tensor | None = None,
    chunk_size: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of every channel and its read-out, skip and gate.

    Per token, channel e and state n, in float32::

        x_f = (x - x_zero_point[e]) * x_scale[e]
        dt_f = softplus(dt + dt_bias[e])
        h[n] = exp(dt_f * A[n, e]) * h[n] + (dt_f * x_f) * B[n] * B_scale[n]
        y = sum_n h[n] * C[n] * C_scale                          readout_scale is None
        y = readout_scale[e] * C_scale * sum_n qh[n] * C[n]      otherwise; exact integer sum
        y = y + D[e] * x_f
        y = y + addend
        y = y * z * sigmoid(gate_scale[e] * z)                   S-SiLU, paper's smooth-fused gate

    with qh[n] = clamp(rne(hr[n] / readout_scale[e]), -127, 127), where hr is h, or with
    rotate_state h H / sqrt(dstate), H the Sylvester Hadamard matrix; C must then have been rotated
    likewise. The rounding factor is computed as (1 / readout_scale[e]) * (1 / sqrt(dstate)) in
    float32 and meets the unnormalised sums h H. The state itself is never quantized.

    Scanned in sequence (chunk_size >= seqlen), the result of a channel depends on nothing but its
    own inputs, and a sequence split anywhere, its state handed on, gives the bits of the whole.
    Chunks change the order of float operations: results then differ by rounding, and with
    readout_scale a rounding of qh may fall the other way. The automatic choice depends on the
    machine. A CPU takes chunks only where batch * ceil(dim / 16) is at most half of its threads, a
    GPU only where dstate is 16 and batch * ceil(dim / 64) is below twice its multiprocessors; its
    chunks hold 64 tokens at most (fewer where its shared memory is small), a larger chunk_size
    below seqlen counts as that, and another dstate is always scanned in sequence.

    Args:
        x: (batch, seqlen, dim), int8. As for dt, B, C and z, the last dimension is contiguous and
            the others may have any stride.
        x_scale: (dim,), float32.
        x_zero_point: (dim,), int32, or None for 0.
        dt: (batch, seqlen, dim), float16/bfloat16/float32: the step before bias and softplus.
        dt_bias: (dim,), float32, or None.
        A: (dstate, dim), float32: -exp(A_log), transposed; dstate from 1 to 256.
        B: (batch, seqlen, dstate), int8/float16/bfloat16/float32.
        B_scale: (dstate,), float32, with an int8 B; None otherwise.
        C: (batch, seqlen, dstate), int8/float16/bfloat16/float32.
        C_scale: (1,), float32, with an int8 C; None otherwise.
        D: (dim,), float32, or None for no skip.
        z: (batch, seqlen, dim), int8/float16/bfloat16/float32, or None for no gate.
        z_scale: (dim,), float32, with an int8 z; None otherwise.
        gate_scale: (dim,), float32: the smoothing factor inside the gate's sigmoid; None for 1.
        readout_scale: (dim,), float32: the quantization step of the (rotated) state in the
            read-out; None for a float read-out. Needs an int8 C.
        rotate_state: rotate the state in the read-out; needs readout_scale and a dstate that is a
            power of two.
        initial_state: (batch, dstate, dim), float32, or None for zeros.
        reverse: walk from the last step to the first; y keeps the order of x.
        order: (seqlen,), int32, contiguous: step t of the walk is at token order[t], a permutation
            of the tokens; None for their order in storage. Every operand and y stay in storage. On
            a GPU, where looking at the values would make the call wait, they are not checked: a
            step at what is no token leaves the state as it is, and reads and writes nothing.
        addend: (batch, seqlen, dim), float16/bfloat16/float32, or None: joins y before the gate, as
            the y of other walks over the same tokens.
        chunk_size: tokens that are scanned in sequence. 0 chooses.
        dtype: of y: float16, bfloat16 or float32.

    Returns:
        y: (batch, seqlen, dim), dtype.
        final_state: (batch, dstate, dim), float32: after the last token of the walk.

    Raises:
        ValueError: a shape, layout or combination that does not fit.
        TypeError: a dtype other than those above.
    """
    return torch.ops.mambaquant.selective_scan(
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
        D,
        z,
        z_scale,
        gate_scale,
        readout_scale,
        rotate_state,
        initial_state,
        reverse,
        order,
        addend,
        chunk_size,
        dtype,
    )


def selective_scan_update(
    ssm_state: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    z_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    readout_scale: Tensor | None = None,
    *,
    rotate_state: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One token of selective_scan per sequence; the bits of the scan in sequence.

    Args:
        ssm_state: (batch, dstate, dim), float32. Changed in place.
        x: (batch, dim), int8; the last dimension of x, dt, B, C and z is contiguous.
        x_scale: (dim,), float32.
        x_zero_point: (dim,), int32, or None for 0.
        dt: (batch, dim), float16/bfloat16/float32: the step before bias and softplus.
        dt_bias: (dim,), float32, or None.
        A: (dstate, dim), float32; dstate from 1 to 256.
        B: (batch, dstate), int8/float16/bfloat16/float32.
        B_scale: (dstate,), float32, with an int8 B; None otherwise.
        C: (batch, dstate), int8/float16/bfloat16/float32.
        C_scale: (1,), float32, with an int8 C; None otherwise.
        D: (dim,), float32, or None for no skip.
        z: (batch, dim), int8/float16/bfloat16/float32, or None for no gate.
        z_scale: (dim,), float32, with an int8 z; None otherwise.
        gate_scale: (dim,), float32; None for 1.
        readout_scale: (dim,), float32, or None for a float read-out.
        rotate_state: rotate the state in the read-out.
        dtype: of y: float16, bfloat16 or float32.

    Returns:
        y: (batch, dim), dtype.

    Raises:
        ValueError: a shape, layout or combination that does not fit.
        TypeError: a dtype other than those above.
    """
    return torch.ops.mambaquant.selective_scan_update(
        ssm_state,
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
        D,
        z,
        z_scale,
        gate_scale,
        readout_scale,
        rotate_state,
        dtype,
    )


@torch.library.register_fake("mambaquant::selective_scan")
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    z_scale: Tensor | None,
    gate_scale: Tensor | None,
    readout_scale: Tensor | None,
    rotate_state: bool,
    initial_state: Tensor | None,
    reverse: bool,
    order: Tensor | None,
    addend: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, _, dim = x.shape
    y = x.new_empty(x.shape, dtype=dtype)
    return y, x.new_empty((batch, A.shape[0], dim), dtype=torch.float32)


@torch.library.register_fake("mambaquant::selective_scan_update")
def _(
    ssm_state: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    B_scale: Tensor | None,
    C: Tensor,
    C_scale: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    z_scale: Tensor | None,
    gate_scale: Tensor | None,
    readout_scale: Tensor | None,
    rotate_state: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
