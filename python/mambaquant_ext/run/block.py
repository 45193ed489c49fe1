"""QuantMambaBlock: norm, Mamba mixer and skip of one layer, in int8, along whatever routes it scans."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts import KernelWeight, PackedBlock
from mambaquant_ext.config import Fidelity, Recipe
from mambaquant_ext.routes import Grid
from mambaquant_ext.run.cache import read_cache, write_cache
from mambaquant_ext.run.mixers import EmulatedMixer, IntegerMixer
from mambaquant_ext.run.modules import FrozenModule


class QuantMambaBlock(FrozenModule):
    """Takes the place of a float Mamba block (norm, mixer, residual add) and keeps its calling contract.

    Data flow, with what each kernel writes (algorithm section 6.3):

        norm -> int8 -> in_proj -> int8 (x | z)
        per route: conv, SiLU -> int8 -> x_proj -> int8 (dt | B | C); dt -> dt_proj -> float32
                   -> scan with softplus, int8 read-out, D, sum of the routes before, S-SiLU gate -> float32
        -> Hadamard -> int8 -> out_proj + skip -> float32

    Tokens stay where they are: a route's order is a gather inside the convolution and the scan.

    The recurrence, its state and the residual stream are float32. With static scales every token's result is the
    same bits in a whole prompt, in chunks, and one at a time.
    """

    def __init__(
        self,
        packed: PackedBlock,
        layer_idx: int = 0,
        fidelity: Fidelity = Fidelity.INTEGER,
        kernel_weights: Mapping[str, KernelWeight] | None = None,
    ) -> None:
        """Packs the weights for the instruction set in use.

        Args:
            packed: the block's structure and tensors.
            layer_idx: this block's index in a model's cache.
            fidelity: integer kernels, or their emulation in float.
            kernel_weights: those that are packed already, by the names of packed.gemm_sources().

        Raises:
            ValueError: integer execution of fewer than 8 bits, or of sizes that the kernels do not have.
        """
        super().__init__()
        self.layer_idx = layer_idx
        self.fidelity = fidelity
        self.layout = packed.layout
        for name, tensor in packed.tensors().items():
            self.register_buffer(name.replace(".", "_"), tensor)
        self._prepare(kernel_weights)

    def prepare(self) -> None:
        """Packs the weights for the device that they are on."""
        self._prepare(None)

    def _prepare(self, kernel_weights: Mapping[str, KernelWeight] | None) -> None:
        tensors = {name: self.get_buffer(name.replace(".", "_")) for name in self.layout.expected()}
        self.packed = PackedBlock.from_tensors(self.layout, tensors)
        self.executor: IntegerMixer | EmulatedMixer
        if self.fidelity is Fidelity.INTEGER:
            self.executor = IntegerMixer(self.packed, kernel_weights)
        else:
            self.executor = EmulatedMixer(self.packed)

    @classmethod
    def from_float(
        cls,
        block: nn.Module,
        hidden_states: Iterable[Tensor],
        recipe: Recipe,
        fidelity: Fidelity = Fidelity.INTEGER,
    ) -> QuantMambaBlock:
        """Quantizes one block by itself.

        The residual stream keeps its basis: the recipe's residual_rotation becomes an online Hadamard transform
        between norm and in_proj. (Folded into a whole model, `quantize_` does without one.)

        Args:
            block: with `norm` and `mixer`, of transformers or mamba_ssm.
            hidden_states: inputs of the block to calibrate on, each (batch, seqlen, hidden), float.
            recipe: how.
            fidelity: integer kernels, or their emulation.

        Raises:
            ValueError: no inputs, wrong shapes, too few tokens for a KLT, or a width without a Hadamard matrix.
        """
        from mambaquant_ext.pipeline import quantize_block

        return quantize_block(block, hidden_states, recipe, fidelity)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        grid: Grid | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        """Residual stream in, residual stream out.

        Args:
            hidden_states: (batch, seqlen, hidden), float16/bfloat16/float32.
            cache_params: a transformers Cache with a linear-attention layer at layer_idx, updated in place, or
                None; or a StateDict. It holds the conv's int8 inputs (batch, width - 1, dim) and the float32 state
                (batch, dstate, dim).
            attention_mask: (batch, seqlen), zero at padding, or None.
            grid: sizes of the axes over which the tokens are stored row by row, such as (height, width); (seqlen,)
                by default.

        Returns:
            (batch, seqlen, hidden), float32.

        Raises:
            ValueError: shapes that do not fit, such as those of a cache of another batch size or model, fewer tokens
                than the class token's place needs, or a cache or padding for a block that is not sequential.
            NotImplementedError: a cache that records the past.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.layout.hidden:
            raise ValueError(
                f"QuantMambaBlock: expected hidden_states of shape (batch, seqlen, {self.layout.hidden}), "
                f"got {tuple(hidden_states.shape)}"
            )
        grid = (hidden_states.shape[1],) if grid is None else grid
        if math.prod(grid) != hidden_states.shape[1]:
            raise ValueError(
                f"QuantMambaBlock: expected a grid of {hidden_states.shape[1]} tokens, got {grid}"
            )
        class_token = self.layout.class_token
        if class_token is not None and class_token >= hidden_states.shape[1]:
            raise ValueError(
                f"QuantMambaBlock: expected a class token at {class_token}, got {hidden_states.shape[1]} tokens"
            )
        mask = None if attention_mask is None else self._mask(attention_mask, hidden_states)
        state = None
        if cache_params is not None:
            if not self.layout.is_sequential:
                raise ValueError(
                    "QuantMambaBlock: expected no cache for a block that walks several routes, got one"
                )
            conv, ssm = self.executor.state_shapes(hidden_states.shape[0])
            state = read_cache(cache_params, self.layer_idx, conv, ssm)
        out, state = self.executor.forward(hidden_states.float(), state, mask, grid)
        if cache_params is not None and state is not None:
            write_cache(cache_params, self.layer_idx, state)
        return out

    def _mask(self, attention_mask: Tensor, hidden_states: Tensor) -> Tensor | None:
        """(batch, seqlen), bool, or None where nothing is padding."""
        if attention_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"QuantMambaBlock: expected attention_mask of shape {tuple(hidden_states.shape[:2])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        if bool(mask.all()):
            return None
        # Means over tokens, images, and states that come in from behind would all see the padding.
        if not self.layout.is_sequential:
            raise ValueError(
                "QuantMambaBlock: expected no padding for a block that is not sequential, got attention_mask with "
                f"{int((~mask).sum())} zero(s)"
            )
        return mask
