"""QuantMambaBlock: norm, Mamba-1 mixer and residual add of one layer, in int8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext import ops
from mambaquant_ext.artifacts import BlockOptions, BlockSizes, PackedBlock
from mambaquant_ext.config import Fidelity, Recipe
from mambaquant_ext.model import MixerState, mixer_forward
from mambaquant_ext.run.emulate import emulated_weights, rounding_tap
from mambaquant_ext.run.modules import FrozenModule, GemmWeight

ONE = torch.ones(1)
CONV_WIDTHS, MAX_DSTATE = (2, 3, 4), 256  # what the kernels take


class QuantMambaBlock(FrozenModule):
    """Takes the place of a float Mamba block (norm, mixer, residual add) and keeps its calling contract.

    Data flow, with what each kernel writes (algorithm section 6.3):

        norm -> int8 -> in_proj -> int8 (x | z) -> conv, SiLU -> int8 -> x_proj -> int8 (dt | B | C)
        dt -> dt_proj -> float32 -> scan with softplus, int8 read-out, D, S-SiLU gate -> float32
        -> Hadamard -> int8 -> out_proj + residual -> float32

    The recurrence, its state and the residual stream are float32. With static scales every token's result is the
    same bits in a whole prompt, in chunks, and one at a time.
    """

    def __init__(
        self,
        packed: PackedBlock,
        options: BlockOptions,
        layer_idx: int = 0,
        fidelity: Fidelity = Fidelity.INTEGER,
    ) -> None:
        """Packs the weights for the instruction set in use.

        Args:
            packed: the block's tensors.
            options: how they are used.
            layer_idx: this block's index in a model's cache.
            fidelity: integer kernels, or their emulation in float.

        Raises:
            ValueError: integer execution of fewer than 8 bits, or of sizes that the kernels do not have.
        """
        super().__init__()
        if fidelity is Fidelity.INTEGER:
            _check_runs_on_kernels(packed.sizes, options)
        self.layer_idx = layer_idx
        self.fidelity = fidelity
        self.options = options
        self.packed = packed
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self.executor = (
            _IntegerMixer(packed, options)
            if fidelity is Fidelity.INTEGER
            else _EmulatedMixer(packed, options)
        )

    @classmethod
    def from_float(
        cls,
        block: nn.Module,
        hidden_states: Iterable[Tensor],
        recipe: Recipe,
        fidelity: Fidelity = Fidelity.INTEGER,
    ) -> QuantMambaBlock:
        """Quantizes one block by itself.

        The residual stream keeps its basis: R1 belongs to a whole model (see `quantize_`).

        Args:
            block: with `norm` and `mixer`, of transformers or mamba_ssm.
            hidden_states: inputs of the block to calibrate on, each (batch, seqlen, hidden), float.
            recipe: how; its residual_rotation is ignored.
            fidelity: integer kernels, or their emulation.

        Raises:
            ValueError: no inputs, wrong shapes, or too few tokens for a KLT.
        """
        from mambaquant_ext.pipeline import quantize_block

        return quantize_block(block, hidden_states, recipe, fidelity)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        """Residual stream in, residual stream out.

        Args:
            hidden_states: (batch, seqlen, hidden), float16/bfloat16/float32.
            cache_params: a transformers Cache with a linear-attention layer at layer_idx, updated in place, or
                None; or a StateDict. It holds the conv's int8 inputs (batch, width - 1, dim) and the float32 state
                (batch, dstate, dim).
            attention_mask: (batch, seqlen), zero at padding, or None.

        Returns:
            (batch, seqlen, hidden), float32.

        Raises:
            ValueError: shapes that do not fit, such as those of a cache of another batch size or model.
            NotImplementedError: a cache that records the past.
        """
        sizes = self.packed.sizes
        if hidden_states.dim() != 3 or hidden_states.shape[2] != sizes.hidden:
            raise ValueError(
                f"QuantMambaBlock: expected hidden_states of shape (batch, seqlen, {sizes.hidden}), "
                f"got {tuple(hidden_states.shape)}"
            )
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"QuantMambaBlock: expected attention_mask of shape {tuple(hidden_states.shape[:2])}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            mask = attention_mask.bool()
            mask = None if bool(mask.all()) else mask
        state = None
        if cache_params is not None:
            conv, ssm = self.executor.state_shapes(hidden_states.shape[0])
            state = _read_cache(cache_params, self.layer_idx, conv, ssm)
        out, state = self.executor.forward(hidden_states.float(), state, mask)
        if cache_params is not None:
            _write_cache(cache_params, self.layer_idx, state)
        return out


def _check_runs_on_kernels(sizes: BlockSizes, options: BlockOptions) -> None:
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


@dataclass(frozen=True, slots=True)
class StateDict:
    """The plainest cache: layer index to state. Stands in for a transformers Cache.

    Attributes:
        states: empty at the start of a sequence.
    """

    states: dict[int, MixerState]


class _IntegerMixer:
    """The int8 data flow. A state is MixerState(int8 (batch, width - 1, dim), float32 (batch, dstate, dim))."""

    def __init__(self, packed: PackedBlock, options: BlockOptions) -> None:
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
        self.dt_scale, self.C_scale = dt_scale[:1].clone(), C_scale[:1].clone()
        self.B_scale = B_scale.clone()
        self.xs_scale, self.z_scale = (part.clone() for part in packed.xz_scale.split(sizes.dim))

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of MixerState.conv and .ssm."""
        sizes = self.packed.sizes
        return (batch, sizes.width - 1, sizes.dim), (batch, sizes.dstate, sizes.dim)

    def forward(
        self, hidden_states: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState]:
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
        dt, B, C = self.x_proj.requantize(x, ONE, self.packed.dtBC_scale).split(self.parts, -1)
        return self.dt_proj.dequantize(dt, self.dt_scale), B, C

    def _readout_scale(self) -> Tensor | None:
        return self.packed.readout_scale if self.options.quantize_readout else None

    def _scan(
        self, xs: Tensor, z: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        """A whole sequence; returns v (tokens, dim) float32 and the final state."""
        p = self.packed
        batch, seqlen, dim = xs.shape
        x, conv_state = ops.causal_conv1d_quantize(
            xs,
            self.xs_scale,
            p.conv,
            p.conv_scale,
            p.conv_bias,
            p.x_scale,
            p.x_zero_point,
            None if state is None else state.conv,
        )
        if mask is not None:
            x = torch.where(mask[..., None], x, p.x_zero_point.to(torch.int8))
        dt, B, C = (part.unflatten(0, (batch, seqlen)) for part in self._dtBC(x.flatten(0, 1)))
        v, ssm_state = ops.selective_scan(
            x,
            p.x_scale,
            p.x_zero_point,
            dt,
            p.dt_bias,
            p.A,
            B,
            self.B_scale,
            C,
            self.C_scale,
            p.D,
            z,
            self.z_scale,
            p.gate_scale,
            self._readout_scale(),
            rotate_state=self.options.has_state_rotation,
            initial_state=None if state is None else state.ssm,
        )
        return v.reshape(batch * seqlen, dim), MixerState(conv_state, ssm_state)

    def _update(self, xs: Tensor, z: Tensor, state: MixerState, mask: Tensor | None) -> Tensor:
        """One token, (batch, dim); the state changes in place."""
        p = self.packed
        x = ops.causal_conv1d_update_quantize(
            xs,
            state.conv,
            self.xs_scale,
            p.conv,
            p.conv_scale,
            p.conv_bias,
            p.x_scale,
            p.x_zero_point,
        )
        if mask is not None:
            x = torch.where(mask, x, p.x_zero_point.to(torch.int8))
        dt, B, C = self._dtBC(x)
        return ops.selective_scan_update(
            state.ssm,
            x,
            p.x_scale,
            p.x_zero_point,
            dt,
            p.dt_bias,
            p.A,
            B,
            self.B_scale,
            C,
            self.C_scale,
            p.D,
            z,
            self.z_scale,
            p.gate_scale,
            self._readout_scale(),
            rotate_state=self.options.has_state_rotation,
        )


class _EmulatedMixer:
    """The same function in float on rounded values; its state is in the float model's layout."""

    def __init__(
        self, packed: PackedBlock, options: BlockOptions, dtype: torch.dtype = torch.float32
    ) -> None:
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
        x = hidden_states.to(self.dtype)
        # Made anew, because a copied module must not round with the scales of the original.
        tap = rounding_tap(self.packed, self.options)
        out, state = mixer_forward(self.weights, x, state, tap, mask)
        return (x + out).float(), state


def _read_cache(
    cache: Any, layer_idx: int, conv_shape: tuple[int, ...], ssm_shape: tuple[int, ...]
) -> MixerState | None:
    """The state of earlier tokens, None at the start of a sequence.

    Raises:
        ValueError: the cache holds states of other shapes. A cache that was reset still holds them: copying into
            them would broadcast one sequence over the batch.
        NotImplementedError: a cache that records the past.
    """
    if isinstance(cache, StateDict):
        held = cache.states.get(layer_idx)
        is_past = held is not None
    else:
        layer = cache.layers[layer_idx]
        if layer.record_past:
            raise NotImplementedError(
                "QuantMambaBlock: expected a cache that does not record the past (no crop)"
            )
        conv, ssm = layer.conv_states[0], layer.recurrent_states[0]
        held = None if conv is None or ssm is None else MixerState(conv, ssm)
        is_past = layer.has_previous_state[0]
    if held is None:
        return None
    shapes = tuple(held.conv.shape), tuple(held.ssm.shape)
    if shapes != (conv_shape, ssm_shape):
        raise ValueError(
            f"QuantMambaBlock: expected cached states of shapes (batch, ...) {conv_shape} and {ssm_shape}, got "
            f"{shapes[0]} and {shapes[1]}; one cache serves one batch size and one model"
        )
    return held if is_past else None


def _write_cache(cache: Any, layer_idx: int, state: MixerState) -> None:
    """Stores a state in a transformers cache layer, in place so that the cache keeps its addresses."""
    if isinstance(cache, StateDict):
        cache.states[layer_idx] = state
        return
    layer = cache.layers[layer_idx]
    if not layer.is_conv_states_initialized[0]:
        layer.lazy_initialization(conv_states=state.conv)
    if layer.conv_states[0] is not state.conv:
        layer.conv_states[0].copy_(state.conv)
    layer.has_previous_state[0] = True
    if layer.recurrent_states[0] is not state.ssm:
        cache.update_recurrent_state(state.ssm, layer_idx)
