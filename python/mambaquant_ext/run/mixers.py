"""The two executors of a quantized block: int8 kernels, and their emulation in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mambaquant_ext import ops
from mambaquant_ext.artifacts import BlockLayout, BranchLayout, KernelWeight, Merge, PackedBlock
from mambaquant_ext.model import MixerState, block_forward
from mambaquant_ext.model.parts import (
    even_sigmoid,
    excited,
    route_shares,
    upsample,
    variation_gate,
)
from mambaquant_ext.routes import Grid, ScanRoute, kernel_order
from mambaquant_ext.run.emulate import emulated_weights, rounding_tap
from mambaquant_ext.run.ends import BlockEntry, BlockExit
from mambaquant_ext.run.modules import GemmWeight
from mambaquant_ext.run.native import NativeBlocks, fits
from mambaquant_ext.run.reading import x_scale_of

# What the kernels take.
CONV_WIDTHS, IMAGE_KERNELS, IMAGE_STRIDES, MAX_DSTATE = (2, 3, 4), (1, 3, 5, 7), (1, 2), 256


def check_runs_on_kernels(layout: BlockLayout) -> None:
    """Refuses at once what an operator would refuse at the first token."""
    bits = (layout.weight_bits, layout.activation_bits, layout.gate_bits)
    what, use = "", "; use Fidelity.EMULATED"
    if bits != (8, 8, 8):
        what = f"8 bits everywhere for Fidelity.INTEGER, got weight, activation, gate bits {bits}"
    for conv in layout.convs:
        if conv.is_causal and conv.kernel[0] not in CONV_WIDTHS:
            what = f"a convolution of width 2, 3 or 4, got {conv.kernel[0]}"
        if not conv.is_causal and not set(conv.kernel) <= set(IMAGE_KERNELS):
            what = f"an image convolution of odd sizes 1 to 7, got {conv.kernel}"
        if conv.stride not in IMAGE_STRIDES:
            what = f"an image convolution of stride 1 or 2, got {conv.stride}"
    for branch in layout.branches:
        if branch.dstate > MAX_DSTATE:
            what = f"a dstate of at most {MAX_DSTATE}, got {branch.dstate}"
        elif layout.has_state_rotation and branch.dstate & (branch.dstate - 1):
            what = f"a dstate that is a power of two, got {branch.dstate}"
            use = "; turn state_rotation off"
    if what:
        raise ValueError(f"QuantMambaBlock: expected {what}{use}")


class _Branch:
    """Weights and constants of one branch for the kernels."""

    def __init__(
        self,
        packed: PackedBlock,
        layout: BranchLayout,
        index: int,
        made: Mapping[str, KernelWeight],
    ) -> None:
        branch = packed.branches[index]
        self.layout = layout
        self.channels = slice(layout.first_channel, layout.first_channel + layout.dim)
        zero_point = packed.x_zero_point_of(index)
        self.x_proj = GemmWeight(
            branch.x_proj,
            branch.x_proj_scale,
            branch.x_proj_bias,
            zero_point,
            made.get(f"branches.{index}.x_proj"),
        )
        self.dt_proj = GemmWeight(
            branch.dt_proj, branch.dt_proj_scale, made=made.get(f"branches.{index}.dt_proj")
        )
        self.parts = [layout.dt_rank, layout.dstate, layout.dstate]
        self.dtBC_scale = branch.dtBC_scale
        dt_scale, B_scale, C_scale = branch.dtBC_scale.split(self.parts)
        self.dt_scale = dt_scale[:1].clone()
        self.one = torch.ones_like(self.dt_scale)  # x's scales are in x_proj's columns
        # Arguments that the whole-sequence and the one-token operator share.
        self.scan_constants: dict[str, Any] = {
            "x_scale": x_scale_of(packed, layout).contiguous(),
            "x_zero_point": zero_point,
            "dt_bias": branch.dt_bias,
            "A": branch.A,
            "B_scale": B_scale.clone(),
            "C_scale": C_scale[:1].clone(),
            "D": branch.D,
            "readout_scale": branch.readout_scale if packed.layout.quantize_readout else None,
            "rotate_state": packed.layout.has_state_rotation,
        }
        self.is_whole = layout.dim == packed.layout.dim
        self.gate_constants: dict[str, Any] = {}
        if packed.layout.has_gate:
            z_scale = packed.xz_scale[packed.layout.dim :]
            self.gate_constants = {
                "z_scale": z_scale[self.channels].clone(),
                "gate_scale": packed.gate_scale[self.channels].clone(),
            }

    def own(self, x: Tensor) -> Tensor:
        """The branch's channels of (..., dim)."""
        return x if self.is_whole else x[..., self.channels]

    def arguments(self, z: Tensor | None) -> dict[str, Any]:
        """What the scan takes of this branch.

        Args:
            z: (..., dim), int8, where the scan gates, else None.
        """
        if z is None:
            return self.scan_constants
        return {**self.scan_constants, **self.gate_constants, "z": self.own(z)}

    def dtBC(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, dim) int8 -> dt (tokens, dim) float32, B and C (tokens, dstate) int8."""
        rows = self.x_proj.requantize(x, self.one, self.dtBC_scale)
        dt, B, C = rows.split(self.parts, -1)
        return self.dt_proj.dequantize(dt, self.dt_scale), B, C


class IntegerMixer:
    """The int8 data flow. A state is MixerState(int8 (batch, width - 1, dim), float32 (batch, dstate, dim))."""

    def __init__(
        self, packed: PackedBlock, kernel_weights: Mapping[str, KernelWeight] | None = None
    ) -> None:
        """Packs the weights.

        Args:
            packed: structure and tensors.
            kernel_weights: those that are packed already, by the names of packed.gemm_sources().

        Raises:
            ValueError: fewer than 8 bits, or sizes that the kernels do not have.
        """
        layout = packed.layout
        check_runs_on_kernels(layout)
        self.packed, self.layout = packed, layout
        made = kernel_weights or {}
        self.entry, self.exit = BlockEntry(packed), BlockExit(packed, made.get("out_proj"))
        self.in_proj = GemmWeight(
            packed.in_proj, packed.in_proj_scale, packed.in_proj_bias, made=made.get("in_proj")
        )
        self.xs_scale = packed.xz_scale[: layout.dim].clone()
        self.z_scale = packed.xz_scale[layout.dim :].clone()
        # A gate is part of the scan unless something comes between scan and gate.
        self.scan_gates = (
            layout.out_norm is None
            and layout.excite_dim is None
            and layout.merge in (Merge.SUM, Merge.GATED)
        )
        self.convs: list[dict[str, Any]] = [
            {
                "x_scale": self.xs_scale,
                "weight": conv.weight,
                "weight_scale": conv.weight_scale,
                "bias": conv.bias,
                "out_scale": conv.x_scale,
                "out_zero_point": conv.x_zero_point,
            }
            for conv in packed.convs
        ]
        self.branches = [_Branch(packed, b, i, made) for i, b in enumerate(layout.branches)]
        self.heads = _heads(layout)
        self.native = NativeBlocks([self]) if fits(self.entry) else None

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of MixerState.conv and .ssm."""
        dim, dstate = self.layout.dim, self.layout.branches[0].dstate
        return (batch, self.layout.convs[0].kernel[0] - 1, dim), (batch, dstate, dim)

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None,
        mask: Tensor | None,
        grid: Grid,
    ) -> tuple[Tensor, MixerState | None]:
        """Residual stream (batch, seqlen, hidden) in and out, float32; see QuantMambaBlock."""
        if self.native is not None and mask is None and self.native.can_run(hidden_states):
            return self._forward_natively(self.native, hidden_states, state)
        batch, seqlen, _ = hidden_states.shape
        rows = hidden_states.reshape(batch * seqlen, self.layout.hidden).contiguous()
        q, skip = self.entry(rows)
        xz = self.in_proj.requantize(q, self.packed.in_scale, self.packed.xz_scale)
        xz = xz.unflatten(0, (batch, seqlen))
        xs, z = xz.split(self.layout.dim, -1) if self.layout.has_gate else (xz, None)
        if mask is not None:
            xs.masked_fill_(~mask[..., None], 0)
        if state is not None and seqlen == 1:
            v = self._update(xs, z, state, mask)
        else:
            walker = _Walker(self, xs, z, grid, state, mask)
            v, state = self._merged(walker), walker.final
        q, scale = self.exit(v)
        out = self.exit.out_proj.dequantize(q, scale, skip)
        return out.unflatten(0, (batch, seqlen)), state

    def _forward_natively(
        self, native: NativeBlocks, hidden_states: Tensor, state: MixerState | None
    ) -> tuple[Tensor, MixerState]:
        """The same bits from one call; a given state changes in place."""
        if state is None:
            conv, ssm = self.state_shapes(hidden_states.shape[0])
            new_zeros = hidden_states.new_zeros
            state = MixerState(new_zeros(conv, dtype=torch.int8), new_zeros(ssm))
        out = hidden_states.new_empty(hidden_states.shape)
        native.forward(hidden_states.contiguous(), state.conv[None], state.ssm[None], out)
        return out, state

    def _merged(self, walker: _Walker) -> Tensor:
        """(batch, seqlen, dim), float32: the routes' results as one, normalised and gated."""
        heads = [self._merged_head(walker, routes) for routes in self.heads]
        y = torch.cat(heads, -1) if len(heads) > 1 else heads[0]
        return self._gated(y, walker.z)

    def _merged_head(self, walker: _Walker, routes: Sequence[ScanRoute]) -> Tensor:
        """The results of the routes over the same channels as one."""
        if self.layout.merge is Merge.SUM:
            return walker.sum(routes)
        results = [walker.scan(route, gates=self.scan_gates) for route in routes]
        if self.layout.merge is Merge.NORMED_SUM:
            results = [(self.exit.normalised(y), grid) for y, grid in results]
        ys = torch.stack([upsample(y, grid, walker.grid) for y, grid in results])
        if self.layout.merge is Merge.VARIATION:
            return ys.sum(0) * variation_gate(ys, self.layout.merge_threshold)
        if self.layout.merge is Merge.GATED:
            assert self.packed.merge_gate is not None
            return (ys * route_shares(ys, self.packed.merge_gate)).sum(0)
        return ys.sum(0)

    def _gated(self, y: Tensor, z: Tensor | None) -> Tensor:
        """What is left to do behind the merge: norm, excitation, and the gate if the scans left it out."""
        if self.scan_gates:
            return y
        if self.layout.merge is not Merge.NORMED_SUM:
            y = self.exit.normalised(y)
        if self.packed.squeeze is not None and self.packed.excite is not None:
            y = excited(y, self.packed.squeeze, self.packed.excite)
        if z is None:
            return y
        gate = z * self.z_scale
        return y * (gate * even_sigmoid(self.packed.gate_scale * gate))

    def _update(
        self, xs: Tensor, z: Tensor | None, state: MixerState, mask: Tensor | None
    ) -> Tensor:
        """One token, (batch, 1, dim); the state changes in place."""
        branch = self.branches[0]
        x = ops.causal_conv1d_update_quantize(xs[:, 0], state.conv, **self.convs[0])
        if mask is not None:
            x = torch.where(mask, x, self.packed.convs[0].x_zero_point.to(torch.int8))
        dt, B, C = branch.dtBC(x)
        arguments = branch.arguments(z[:, 0] if z is not None and self.scan_gates else None)
        y = ops.selective_scan_update(state.ssm, x=x, dt=dt, B=B, C=C, **arguments)
        return self._gated(y[:, None], z)


def _heads(layout: BlockLayout) -> list[list[ScanRoute]]:
    """Routes that scan the same channels, in the order of channels."""
    heads: dict[int, list[ScanRoute]] = {}
    for route in layout.routes:
        heads.setdefault(layout.branches[route.branch].first_channel, []).append(route)
    return [heads[first] for first in sorted(heads)]


class _Walker:
    """Convolves and scans along the routes of one block, one call of it."""

    def __init__(
        self,
        mixer: IntegerMixer,
        xs: Tensor,
        z: Tensor | None,
        grid: Grid,
        state: MixerState | None,
        mask: Tensor | None,
    ) -> None:
        self.mixer, self.xs, self.z, self.grid = mixer, xs, z, grid
        self.state, self.mask = state, mask
        self.conv_state: Tensor | None = None
        self.ssm_state: Tensor | None = None
        self._shared: dict[int, tuple[Tensor, Grid]] = {}

    @property
    def final(self) -> MixerState | None:
        """The state after the last token, of a sequential block."""
        if not self.mixer.layout.is_sequential:
            return None
        assert self.conv_state is not None and self.ssm_state is not None
        return MixerState(self.conv_state, self.ssm_state)

    def sum(self, routes: Sequence[ScanRoute]) -> Tensor:
        """(batch, seqlen, channels) float32: the routes' sum.

        Each scan takes the sum so far as its addend; the last one gates, if scans do.
        """
        total: Tensor | None = None
        for index, route in enumerate(routes):
            is_last = index == len(routes) - 1
            total, _ = self.scan(route, total, gates=self.mixer.scan_gates and is_last)
        assert total is not None
        return total

    def scan(
        self, route: ScanRoute, addend: Tensor | None = None, *, gates: bool
    ) -> tuple[Tensor, Grid]:
        """(batch, tokens, channels of the branch), float32, and the grid of these tokens."""
        branch = self.mixer.branches[route.branch]
        x, grid = self._convolve(route)
        x = branch.own(x)
        shape = x.shape[:2]
        dt, B, C = (part.unflatten(0, shape) for part in branch.dtBC(x.flatten(0, 1)))
        initial = None if self.state is None else self.state.ssm
        y, self.ssm_state = ops.selective_scan(
            x=x,
            dt=dt,
            B=B,
            C=C,
            initial_state=self.ssm_state if route.continues else initial,
            reverse=route.reverse,
            order=kernel_order(route.order, grid, x.device),
            addend=addend,
            **branch.arguments(self.z if gates else None),
        )
        return y, grid

    def _convolve(self, route: ScanRoute) -> tuple[Tensor, Grid]:
        """What the route scans, (batch, tokens, dim) int8, and its grid."""
        index = self.mixer.layout.branches[route.branch].conv
        if index is None:
            return self.xs, self.grid
        conv = self.mixer.layout.convs[index]
        if conv.is_causal and conv.along_route:
            x, self.conv_state = ops.causal_conv1d_quantize(
                self.xs,
                initial_state=None if self.state is None else self.state.conv,
                reverse=route.reverse,
                order=kernel_order(route.order, self.grid, self.xs.device),
                **self.mixer.convs[index],
            )
            return self._masked(x, index), self.grid
        if index not in self._shared:
            self._shared[index] = self._convolve_once(index)
        return self._shared[index]

    def _convolve_once(self, index: int) -> tuple[Tensor, Grid]:
        conv, constants = self.mixer.layout.convs[index], self.mixer.convs[index]
        if conv.is_causal:
            x, _ = ops.causal_conv1d_quantize(self.xs, **constants)
            return x, self.grid
        image = ops.depthwise_conv2d_quantize(
            self.xs.unflatten(1, self.grid), stride=conv.stride, **constants
        )
        return image.flatten(1, 2), (image.shape[1], image.shape[2])

    def _masked(self, x: Tensor, index: int) -> Tensor:
        if self.mask is None:
            return x
        zero_point = self.mixer.packed.convs[index].x_zero_point.to(torch.int8)
        return torch.where(self.mask[..., None], x, zero_point)


class EmulatedMixer:
    """The same function in float on rounded values; its state is in the float model's layout."""

    def __init__(self, packed: PackedBlock, dtype: torch.dtype = torch.float32) -> None:
        """Dequantizes the weights into `dtype`."""
        self.weights = emulated_weights(packed, dtype)
        self.packed = packed
        self.dtype = dtype

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of MixerState.conv and .ssm."""
        dim, branch = self.weights.dim, self.weights.branches[0]
        width = self.weights.convs[0].weight.shape[1]
        return (batch, width - 1, dim), (batch, dim, branch.dstate)

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None,
        mask: Tensor | None,
        grid: Grid,
    ) -> tuple[Tensor, MixerState | None]:
        """Residual stream (batch, seqlen, hidden) in and out, float32."""
        x = hidden_states.to(self.dtype)
        # Made anew, because a copied module must not round with the scales of the original.
        tap = rounding_tap(self.packed)
        out, state = block_forward(self.weights, x, state, tap, mask, grid)
        return out.float(), state
