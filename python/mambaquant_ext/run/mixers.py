"""The two executors of a quantized block: int8 kernels, and their emulation in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaquant_ext import ops
from mambaquant_ext.artifacts import BlockOptions, BlockSizes, PackedBlock
from mambaquant_ext.model import MixerState, mixer_forward
from mambaquant_ext.run.emulate import emulated_weights, rounding_tap
from mambaquant_ext.run.modules import GemmWeight

CONV_WIDTHS, MAX_DSTATE = (2, 3, 4), 256  # what the kernels take


def check_runs_on_kernels(sizes: BlockSizes, options: BlockOptions) -> None:
    """Refuses at once what an operator would refuse at the first token."""
    bits = (options.weight_bits, options.activation_bits, options.gate_bits)
    what, use = "", "; use Fidelity.EMULATED"
    if bits != (8, 8, 8):
        what = f"8 bits everywhere for Fidelity.INTEGER, got weight, activation, gate bits {bits}"
    elif sizes.width not in CONV_WIDTHS:
        what = f"a convolution of width 2, 3 or 4, got {sizes.width}"
    elif sizes.dstate > MAX_DSTATE:
        what = f"a dstate of at most {MAX_DSTATE}, got {sizes.dstate}"
    elif options.has_state_rotation and sizes.dstate & (sizes.dstate - 1):
        what, use = (
            f"a dstate that is a power of two, got {sizes.dstate}",
            "; turn state_rotation off",
        )
    if what:
        raise ValueError(f"QuantMambaBlock: expected {what}{use}")


class IntegerMixer:
    """The int8 data flow. A state is MixerState(int8 (batch, width - 1, dim), float32 (batch, dstate, dim))."""

    def __init__(self, packed: PackedBlock, options: BlockOptions) -> None:
        """Packs the weights.

        Raises:
            ValueError: fewer than 8 bits, or sizes that the kernels do not have.
        """
        check_runs_on_kernels(packed.sizes, options)
        sizes = packed.sizes
        self.packed, self.options = packed, options
        self.norm_weight = None if bool((packed.norm_weight == 1).all()) else packed.norm_weight
        self.in_proj = GemmWeight(packed.in_proj, packed.in_proj_scale, packed.in_proj_bias)
        self.x_proj = GemmWeight(
            packed.x_proj, packed.x_proj_scale, packed.x_proj_bias, packed.x_zero_point
        )
        self.dt_proj = GemmWeight(packed.dt_proj, packed.dt_proj_scale)
        self.out_proj = GemmWeight(packed.out_proj, packed.out_proj_scale, packed.out_proj_bias)
        self.parts = [sizes.dt_rank, sizes.dstate, sizes.dstate]
        dt_scale, B_scale, C_scale = packed.dtBC_scale.split(self.parts)
        xs_scale, z_scale = packed.xz_scale.split(sizes.dim)
        self.dt_scale = dt_scale[:1].clone()
        self.one = torch.ones_like(self.dt_scale)  # x's scales are in x_proj's columns
        # Arguments that the whole-sequence and the one-token operator share.
        self.conv_constants: dict[str, Any] = {
            "x_scale": xs_scale.clone(),
            "weight": packed.conv,
            "weight_scale": packed.conv_scale,
            "bias": packed.conv_bias,
            "out_scale": packed.x_scale,
            "out_zero_point": packed.x_zero_point,
        }
        self.scan_constants: dict[str, Any] = {
            "x_scale": packed.x_scale,
            "x_zero_point": packed.x_zero_point,
            "dt_bias": packed.dt_bias,
            "A": packed.A,
            "B_scale": B_scale.clone(),
            "C_scale": C_scale[:1].clone(),
            "D": packed.D,
            "z_scale": z_scale.clone(),
            "gate_scale": packed.gate_scale,
            "readout_scale": packed.readout_scale if options.quantize_readout else None,
            "rotate_state": options.has_state_rotation,
        }

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of MixerState.conv and .ssm."""
        sizes = self.packed.sizes
        return (batch, sizes.width - 1, sizes.dim), (batch, sizes.dstate, sizes.dim)

    def forward(
        self, hidden_states: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """Residual stream (batch, seqlen, hidden) in and out, float32; see QuantMambaBlock."""
        p, sizes = self.packed, self.packed.sizes
        batch, seqlen, _ = hidden_states.shape
        residual = hidden_states.reshape(batch * seqlen, sizes.hidden)
        q, _, _ = ops.rmsnorm_quantize(
            residual, self.norm_weight, None, p.in_scale, self.options.norm_eps
        )
        xz = self.in_proj.requantize(q, p.in_scale, p.xz_scale).unflatten(0, (batch, seqlen))
        xs, z = xz.split(sizes.dim, -1)
        if mask is not None:
            xs.masked_fill_(~mask[..., None], 0)
        if state is not None and seqlen == 1:
            v = self._update(xs[:, 0], z[:, 0], state, mask)
        else:
            v, state = self._scan(xs, z, state, mask)
        if self.options.has_out_rotation:
            q, _ = ops.hadamard_quantize(v, p.out_scale)
        else:
            q = ops.quantize(v, p.out_scale)
        out = self.out_proj.dequantize(q, p.out_scale, residual)
        return out.unflatten(0, (batch, seqlen)), state

    def _dtBC(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, dim) int8 -> dt (tokens, dim) float32, B and C (tokens, dstate) int8."""
        dt, B, C = self.x_proj.requantize(x, self.one, self.packed.dtBC_scale).split(self.parts, -1)
        return self.dt_proj.dequantize(dt, self.dt_scale), B, C

    def _scan(
        self, xs: Tensor, z: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """A whole sequence; returns v (tokens, dim) float32 and the final state."""
        batch, seqlen, dim = xs.shape
        x, conv_state = ops.causal_conv1d_quantize(
            xs, initial_state=None if state is None else state.conv, **self.conv_constants
        )
        if mask is not None:
            x = torch.where(mask[..., None], x, self.packed.x_zero_point.to(torch.int8))
        dt, B, C = (part.unflatten(0, (batch, seqlen)) for part in self._dtBC(x.flatten(0, 1)))
        initial = None if state is None else state.ssm
        v, ssm_state = ops.selective_scan(
            x=x, dt=dt, B=B, C=C, z=z, initial_state=initial, **self.scan_constants
        )
        return v.reshape(batch * seqlen, dim), MixerState(conv_state, ssm_state)

    def _update(self, xs: Tensor, z: Tensor, state: MixerState, mask: Tensor | None) -> Tensor:
        """One token, (batch, dim); the state changes in place."""
        x = ops.causal_conv1d_update_quantize(xs, state.conv, **self.conv_constants)
        if mask is not None:
            x = torch.where(mask, x, self.packed.x_zero_point.to(torch.int8))
        dt, B, C = self._dtBC(x)
        return ops.selective_scan_update(
            state.ssm, x=x, dt=dt, B=B, C=C, z=z, **self.scan_constants
        )


class EmulatedMixer:
    """The same function in float on rounded values; its state is in the float model's layout."""

    def __init__(
        self, packed: PackedBlock, options: BlockOptions, dtype: torch.dtype = torch.float32
    ) -> None:
        """Dequantizes the weights into `dtype`."""
        self.weights = emulated_weights(packed, options, dtype)
        self.packed, self.options = packed, options
        self.dtype = dtype

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of MixerState.conv and .ssm."""
        weights = self.weights
        return (batch, weights.width - 1, weights.dim), (batch, weights.dim, weights.dstate)

    def forward(
        self, hidden_states: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """Residual stream (batch, seqlen, hidden) in and out, float32."""
        x = hidden_states.to(self.dtype)
        # Made anew, because a copied module must not round with the scales of the original.
        tap = rounding_tap(self.packed, self.options)
        out, state = mixer_forward(self.weights, x, state, tap, mask)
        return (x + out).float(), state
