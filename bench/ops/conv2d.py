"""Bench cases of depthwise_conv2d_quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.harness import BenchCase
from bench.shapes import IMAGE_BATCH, IMAGES, ImageShape
from mambaquant_ext import ops

# Per element, held against the float32 roof: an instruction of the taps takes two of them (pairs of int16) where a
# float32 multiply-add would take one, so that a tap counts as one operation; and 16 for scaling, bias, SiLU and
# rounding.
OPERATIONS_BESIDE_TAPS = 16


def _arguments(image: ImageShape, batch: int) -> dict[str, torch.Tensor]:
    shape = (batch, image.height, image.width, image.dim)
    return {
        "x": torch.randint(-127, 128, shape, dtype=torch.int8),
        "x_scale": torch.rand(image.dim) * 0.02 + 0.01,
        "weight": torch.randint(
            -127, 128, (image.kernel, image.kernel, image.dim), dtype=torch.int8
        ),
        "weight_scale": torch.rand(image.dim) * 0.002 + 0.0005,
        "bias": torch.randn(image.dim),
        "out_scale": torch.rand(image.dim) * 0.02 + 0.02,
        "out_zero_point": torch.full((image.dim,), -100, dtype=torch.int32),
    }


def _check(arguments: dict[str, torch.Tensor], stride: int) -> None:
    from tests.reference import conv2d as reference
    from tests.tolerances import assert_int8_close

    q = ops.depthwise_conv2d_quantize(**arguments, stride=stride)
    assert_int8_close(q, reference.depthwise_conv2d_quantize(**arguments, stride=stride))


def _torch_float(
    image: ImageShape, batch: int, memory_format: torch.memory_format
) -> Callable[[], object]:
    x = torch.randn(batch, image.dim, image.height, image.width)
    if x.is_cuda:
        x = x.half()
    x = x.contiguous(memory_format=memory_format)
    weight = torch.randn(image.dim, 1, image.kernel, image.kernel).to(x.dtype)
    bias = torch.randn(image.dim).to(x.dtype)

    def run() -> torch.Tensor:
        y = torch.nn.functional.conv2d(
            x, weight, bias, image.stride, image.kernel // 2, groups=image.dim
        )
        return torch.nn.functional.silu(y)

    return run


def _case(image: ImageShape, batch: int) -> BenchCase:
    arguments = _arguments(image, batch)
    x = arguments["x"]
    outputs = batch * image.out_height * image.out_width * image.dim
    dtype = "float16" if x.is_cuda else "float32"
    layouts = {"": torch.contiguous_format, " channels last": torch.channels_last}
    return BenchCase(
        "depthwise_conv2d_quantize",
        f"{image.name} {batch}x{image.height}x{image.width}x{image.dim}"
        f" {image.kernel}x{image.kernel}/{image.stride}",
        lambda: ops.depthwise_conv2d_quantize(**arguments, stride=image.stride),
        lambda: _check(arguments, image.stride),
        bytes_moved=x.numel() + outputs,
        operations=(image.kernel**2 + OPERATIONS_BESIDE_TAPS) * outputs,
        baselines={
            f"torch {dtype}{name}": _torch_float(image, batch, layout)
            for name, layout in layouts.items()
        },
    )


def cases(preset: str) -> Iterator[BenchCase]:
    """The conv of each stage of a hierarchical model, and the one that takes it to half the grid."""
    for image in IMAGES[preset]:
        for batch in IMAGE_BATCH[preset]:
            yield _case(image, batch)
