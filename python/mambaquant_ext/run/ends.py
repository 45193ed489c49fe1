"""The two ends of a block on int8 kernels: what comes before in_proj, and what comes behind the scans."""

from __future__ import annotations

import torch
from torch import Tensor

from mambaquant_ext import ops
from mambaquant_ext.artifacts import KernelWeight, NormKind, PackedBlock, Skip
from mambaquant_ext.model.parts import apply_norm
from mambaquant_ext.run.modules import GemmWeight
from mambaquant_ext.run.reading import norm_before, norm_behind


def _or_none(parameter: Tensor | None, neutral: float) -> Tensor | None:
    """A parameter, or None where all its values are neutral and the kernels can leave it out."""
    if parameter is None or bool((parameter == neutral).all()):
        return None
    return parameter


class BlockEntry:
    """Norm and rounding before in_proj, and the skip around the mixer."""

    def __init__(self, packed: PackedBlock) -> None:
        """Takes a block's norm and skip."""
        self.packed, self.layout = packed, packed.layout
        self.norm = norm_before(packed)
        self.weight = _or_none(packed.norm_weight, 1.0)
        self.bias = _or_none(packed.norm_bias, 0.0)
        # One kernel, unless something else reads what the norm gives, or a transform comes between; the kernel of
        # RMSNorm knows no bias.
        has_rms_bias = self.layout.norm is NormKind.RMS and self.bias is not None
        self.is_fused = not (
            self.layout.skip is Skip.NORMALISED or self.layout.has_in_rotation or has_rms_bias
        )

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """in_proj's input, and what out_proj's result is added to.

        Args:
            rows: (tokens, hidden), float32.

        Returns:
            q: (tokens, hidden), int8 with in_scale.
            skip: (tokens, hidden), float32, or None.
        """
        scale, layout = self.packed.in_scale, self.layout
        skip = rows if layout.skip is Skip.RESIDUAL else None
        if self.is_fused and layout.norm is NormKind.RMS:
            q, _, _ = ops.rmsnorm_quantize(rows, self.weight, None, scale, layout.norm_eps)
            return q, skip
        if self.is_fused and layout.norm is NormKind.LAYER:
            q, _, _ = ops.layernorm_quantize(
                rows, self.weight, self.bias, None, scale, layout.norm_eps
            )
            return q, skip
        normed = rows if self.norm is None else apply_norm(self.norm, rows)
        if layout.skip is Skip.NORMALISED:
            skip = self._normalised_skip(normed)
        if layout.has_in_rotation:
            return ops.hadamard_quantize(normed, scale)[0], skip
        return ops.quantize(normed, scale), skip

    def _normalised_skip(self, normed: Tensor) -> Tensor:
        weight, bias = self.packed.skip_weight, self.packed.skip_bias
        assert weight is not None and bias is not None
        if self.layout.has_skip_matrix:
            return torch.addmm(bias, normed, weight)
        return torch.addcmul(bias, normed, weight)


class BlockExit:
    """Norm, online rotation and rounding behind the scans, and out_proj."""

    def __init__(self, packed: PackedBlock, out_proj: KernelWeight | None = None) -> None:
        """Packs out_proj, unless that has been done."""
        self.packed, self.layout = packed, packed.layout
        self.norm = norm_behind(packed)
        self.out_proj = GemmWeight(
            packed.out_proj, packed.out_proj_scale, packed.out_proj_bias, made=out_proj
        )

    def normalised(self, y: Tensor) -> Tensor:
        """The norm between merge and gate.

        Args:
            y: (..., dim), float32.
        """
        return y if self.norm is None else apply_norm(self.norm, y)

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """out_proj's input.

        Args:
            v: (batch, seqlen, dim), float32.

        Returns:
            q: (batch * seqlen, dim), int8.
            scale: (1,) or (batch * seqlen,), float32.
        """
        scale, row_scale = self.packed.out_scale, self.packed.out_scale
        if self.packed.class_out_scale is not None:
            v, row_scale = self._with_class_token(v, self.packed.class_out_scale)
        rows = v.reshape(-1, self.layout.dim)
        if self.layout.has_out_rotation:
            return ops.hadamard_quantize(rows, scale)[0], row_scale
        return ops.quantize(rows, scale), row_scale

    def _with_class_token(self, v: Tensor, class_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The class token brought to the others' range, and each row's scale.

        Rounding v * (scale / class_scale) to steps of `scale` is rounding v to steps of `class_scale`.
        """
        at = self.layout.class_token
        assert at is not None
        v[:, at] *= self.packed.out_scale / class_scale
        scales = self.packed.out_scale.repeat(v.shape[1])
        scales[at] = class_scale[0]
        return v, scales.repeat(v.shape[0])
