"""Plain weights of the modules that Mamba blocks are made of; nothing shares storage with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambaquant_ext.artifacts.layout import NormKind
from mambaquant_ext.model.weights import BranchWeights, ConvWeights, NormWeights


def copied(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU.

    Args:
        tensor: (...), of any floating dtype.
    """
    return tensor.detach().to("cpu", torch.float32, copy=True)


def copied_or_zeros(tensor: Tensor | None, size: int) -> Tensor:
    """A float32 copy on the CPU, or zeros for None.

    Args:
        tensor: (size,), of any floating dtype, or None.
        size: of the zeros.
    """
    return torch.zeros(size) if tensor is None else copied(tensor)


def read_conv(conv: nn.Conv1d | nn.Conv2d, along_route: bool = True) -> ConvWeights:
    """A depthwise convolution.

    Args:
        conv: causal and one-dimensional, or two-dimensional and padded by half a kernel.
        along_route: see ConvWeights.

    Raises:
        ValueError: a convolution of another kind.
    """
    size, stride = tuple(conv.kernel_size), tuple(conv.stride)
    if conv.groups != conv.in_channels or conv.in_channels != conv.out_channels:
        raise ValueError(
            f"expected a depthwise convolution, got groups {conv.groups} of {conv.in_channels} channels"
        )
    if isinstance(conv, nn.Conv2d):
        padding = tuple(s // 2 for s in size)
        is_odd = all(s % 2 for s in size)
        if (
            not is_odd
            or conv.padding != padding
            or len(set(stride)) != 1
            or set(conv.dilation) != {1}
        ):
            raise ValueError(
                "expected a 2-D convolution of odd size, padded by half of it, with one stride and no dilation, "
                f"got {conv}"
            )
    elif stride != (1,) or conv.dilation != (1,):
        raise ValueError(f"expected a 1-D convolution without stride and dilation, got {conv}")
    weight = copied(conv.weight)[:, 0]
    return ConvWeights(
        weight=weight,
        bias=copied_or_zeros(conv.bias, weight.shape[0]),
        stride=int(stride[0]),
        along_route=along_route,
    )


def read_branch(
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    conv: int | None = 0,
    first_channel: int = 0,
) -> BranchWeights:
    """A branch of separate modules.

    Args:
        x_proj: (dim) -> dt_rank + 2 dstate, rows dt, B, C; no bias.
        dt_proj: (dt_rank) -> dim.
        A_log: (dim, dstate).
        D: (dim,).
        conv: see BranchWeights.
        first_channel: see BranchWeights.
    """
    return branch_of_tensors(
        x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D, conv, first_channel
    )


def branch_of_tensors(
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    conv: int | None = 0,
    first_channel: int = 0,
) -> BranchWeights:
    """A branch of plain tensors.

    Args:
        x_proj: (dt_rank + 2 dstate, dim), rows dt, B, C.
        dt_proj: (dim, dt_rank).
        dt_bias: (dim,), or None.
        A_log: (dim, dstate).
        D: (dim,).
        conv: see BranchWeights.
        first_channel: see BranchWeights.
    """
    dim, dt_rank = dt_proj.shape
    dstate = A_log.shape[1]
    x_dt, x_B, x_C = copied(x_proj).split([dt_rank, dstate, dstate])
    return BranchWeights(
        x_dt=x_dt,
        x_dt_bias=torch.zeros(dt_rank),
        x_B=x_B,
        x_C=x_C,
        dt=copied(dt_proj),
        dt_bias=copied_or_zeros(dt_bias, dim),
        A=-torch.exp(copied(A_log)),
        D=copied(D),
        conv=conv,
        first_channel=first_channel,
    )


def norm_weights(norm: nn.Module) -> NormWeights:
    """An RMSNorm or LayerNorm of torch, or of the same attributes.

    Args:
        norm: with weight, eps, and maybe a bias. Its class name says which of the two it is.

    Raises:
        TypeError: a module of another kind.
    """
    weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
    name = type(norm).__name__.lower()
    kinds = [kind for kind, word in _KINDS.items() if word in name]
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None or len(kinds) != 1:
        raise TypeError(f"expected an RMSNorm or LayerNorm with a weight, got {norm}")
    return NormWeights(
        kind=kinds[0],
        weight=copied(weight),
        bias=copied_or_zeros(getattr(norm, "bias", None), len(weight)),
        eps=float(eps),
    )


_KINDS = {NormKind.RMS: "rms", NormKind.LAYER: "layer"}
