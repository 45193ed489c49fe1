"""Quantized building blocks: a packed GEMM weight, the embedding table, the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambaquant_ext import ops
from mambaquant_ext._load import device_types
from mambaquant_ext.artifacts import KernelWeight, PackedHead
from mambaquant_ext.model.parts import rms_norm
from mambaquant_ext.run.emulate import round_symmetric


class FrozenModule(nn.Module):
    """A module whose tensors keep their dtypes: `model.half()` must not turn scales into float16.

    Its tensors stand in buffers and parameters of its own; `prepare` makes the rest from them.
    """

    def prepare(self) -> None:
        """Makes what the kernels want of the tensors, for the device that these are on."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0, dtype=torch.float32)).device
        if device.type not in device_types():
            raise NotImplementedError(
                f"{type(self).__name__}: expected device {' or '.join(device_types())} (what this build has "
                f"kernels for), got {device}"
            )
        tensors = dict(self.named_buffers(recurse=False))
        if any(tensor.device != device for tensor in [*tensors.values(), *self.parameters()]):
            for name, tensor in tensors.items():
                setattr(self, name, tensor.to(device))
            for parameter in self.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            self.prepare()
        return self


def kernel_weight(weight: Tensor, zero_point: Tensor | None = None) -> KernelWeight:
    """Packs a matrix for the kernels in use.

    Args:
        weight: (N, K), int8.
        zero_point: (K,), int32, of the activation, or None.
    """
    packed, layout = ops.pack_gemm_weight(weight)
    acc_offset = None
    if zero_point is not None:
        # Exact: |sum| <= 131,072 * 128 * 127 < 2^53.
        acc_offset = (weight.double() @ zero_point.double()).to(torch.int32)
    return KernelWeight(packed=packed, layout=layout, acc_offset=acc_offset)


class GemmWeight:
    """An int8 weight packed for the kernels of the instruction set in use, with its epilogue's constants."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        zero_point: Tensor | None = None,
        made: KernelWeight | None = None,
    ) -> None:
        """Packs.

        Args:
            weight: (N, K), int8.
            scale: (N,), float32.
            bias: (N,), float32; zeros count as none.
            zero_point: (K,), int32, of the activation; zeros count as none.
            made: of this weight and zero_point for the kernels in use, where that has been done; else None.
        """
        zero_point = zero_point if zero_point is not None and bool(zero_point.any()) else None
        made = kernel_weight(weight, zero_point) if made is None else made
        self.packed, self.layout = made.packed, made.layout
        self.scale = scale
        self.bias = bias if bias is not None and bool(bias.any()) else None
        self.acc_offset = None if zero_point is None else made.acc_offset

    def requantize(self, a: Tensor, a_scale: Tensor, out_scale: Tensor) -> Tensor:
        """(tokens, K) int8 -> (tokens, N) int8 on the grid out_scale (N,)."""
        return ops.gemm_requantize(
            a, self.packed, self.layout, a_scale, self.scale, out_scale, self.acc_offset, self.bias
        )

    def dequantize(self, a: Tensor, a_scale: Tensor, residual: Tensor | None = None) -> Tensor:
        """(tokens, K) int8 -> (tokens, N) float32, plus `residual` if given."""
        return ops.gemm_dequantize(
            a, self.packed, self.layout, a_scale, self.scale, self.acc_offset, self.bias, residual
        )


class QuantEmbedding(FrozenModule):
    """An embedding table of int8 rows with one scale each, or of float16 rows."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, head: PackedHead) -> None:
        """Takes the table of a packed head."""
        super().__init__()
        self.register_buffer("weight", head.embedding)
        self.register_buffer("scale", head.embedding_scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Looks rows up.

        Args:
            input_ids: (...), int64.

        Returns:
            (..., hidden), float32.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        rows = nn.functional.embedding(input_ids, self.weight).float()
        return rows if self.scale is None else rows * self.scale[input_ids][..., None]


class FinalNorm(FrozenModule):
    """The RMSNorm before the head, in float32 whatever the model is cast to."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """Takes a weight.

        Args:
            weight: (hidden,), float32.
            eps: added to the mean square.
        """
        super().__init__()
        # The one parameter of a quantized model: its libraries ask parameters for a dtype and a device.
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises.

        Args:
            x: (..., hidden), float16/bfloat16/float32.

        Returns:
            (..., hidden), float32.
        """
        return rms_norm(x.float(), self.weight, self.eps)


class QuantLinear(FrozenModule):
    """A linear layer: int8 product with a static input scale, or float32, or the former emulated."""

    q_weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    in_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor | None = None,
        bias: Tensor | None = None,
        in_scale: Tensor | None = None,
        activation_bits: int = 8,
        emulated: bool = False,
        made: KernelWeight | None = None,
    ) -> None:
        """Takes a packed weight.

        Args:
            weight: (N, K), int8 with a weight_scale, float32 without.
            weight_scale: (N,), float32, or None.
            bias: (N,), float32, or None.
            in_scale: (1,), float32, of the input, with an int8 weight.
            activation_bits: of the input; 8 unless emulated.
            emulated: compute in float on rounded values.
            made: of the weight for the kernels in use, where that has been done; else None.
        """
        super().__init__()
        self.register_buffer("q_weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("in_scale", in_scale)
        self.out_features, self.in_features = weight.shape
        self._bits, self._is_emulated = activation_bits, emulated
        self._prepare(made)

    def prepare(self) -> None:
        """Packs the weight, or makes it float."""
        self._prepare(None)

    def _prepare(self, made: KernelWeight | None) -> None:
        self.packed: GemmWeight | None = None
        self._float: Tensor | None = None
        if self.weight_scale is None:
            self._float = self.q_weight
        elif self._is_emulated:
            self._float = self.q_weight.float() * self.weight_scale[:, None]
        else:
            self.packed = GemmWeight(self.q_weight, self.weight_scale, self.bias, made=made)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the float weight that this layer stands for, without storage.

        transformers casts the head's input to `lm_head.weight.dtype`.
        """
        return torch.empty(self.out_features, self.in_features, dtype=torch.float32, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias.

        Args:
            x: (..., in_features), float16/bfloat16/float32/float64.

        Returns:
            (..., out_features), float32.
        """
        if self.packed is not None:
            assert self.in_scale is not None
            x = x.float() if x.dtype == torch.float64 else x
            q = ops.quantize(x.reshape(-1, self.in_features).contiguous(), self.in_scale)
            out: Tensor = self.packed.dequantize(q, self.in_scale).unflatten(0, x.shape[:-1])
            return out
        assert self._float is not None
        if self.in_scale is not None:
            x = round_symmetric(x.float(), self.in_scale, self._bits)
        return nn.functional.linear(x.float(), self._float, self.bias)
