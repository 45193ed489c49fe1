"""Cases of depthwise_conv2d_quantize."""

from dataclasses import dataclass

import torch

from cases import inputs


@dataclass(frozen=True)
class Conv2dCase:
    name: str
    batch: int = 2
    height: int = 5
    width: int = 9
    dim: int = 33
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    bias: bool = True
    asymmetric: bool = True
    kind: str = "uniform"  # uniform, extreme, zeros
    view: bool = False

    def make(self, generator):
        """The keyword arguments of depthwise_conv2d_quantize."""
        shape = (self.batch, self.height, self.width, self.dim)
        x = inputs.int8(shape, generator)
        weight = inputs.int8((*self.kernel, self.dim), generator)
        if self.kind == "extreme":
            x = torch.where(x > 0, 127, -128).to(torch.int8)
            weight = torch.where(weight > 0, 127, -127).to(torch.int8)
        if self.kind == "zeros":
            x = torch.zeros_like(x)
        if self.view:  # the left columns of in_proj's output, of a crop of the image
            wide = torch.full((self.batch, self.height + 1, self.width + 2, 2 * self.dim), 99)
            wide = wide.to(torch.int8)
            wide[:, 1:, 1:-1, : self.dim] = x
            x = wide[:, 1:, 1:-1, : self.dim]
        channels = (self.dim,)
        zero_point = torch.randint(-128, 128, channels, generator=generator, dtype=torch.int32)
        # Sums grow with the root of the taps; so that SiLU is neither flat nor straight for most of them.
        taps = self.kernel[0] * self.kernel[1]
        return {
            "x": x,
            "x_scale": inputs.positive(channels, generator),
            "weight": weight,
            "weight_scale": inputs.positive(channels, generator, 0.001, 0.01) * (4 / taps) ** 0.5,
            "bias": inputs.normal(channels, generator) if self.bias else None,
            "out_scale": inputs.positive(channels, generator),
            "out_zero_point": zero_point if self.asymmetric else None,
            "stride": self.stride,
        }


def _table():
    for dim in inputs.DIMS:
        yield Conv2dCase(f"dim{dim}", dim=dim, stride=dim % 2 + 1)
    # One row or column, fewer than the kernel has, and around one and two strips of 7 outputs.
    for size in (1, 2, 3, 6, 7, 8, 13, 14, 15, 30):
        for stride in (1, 2):
            name = f"{size}-stride{stride}"
            yield Conv2dCase(f"width{name}", width=size, stride=stride)
            yield Conv2dCase(f"height{name}", height=size, width=4, stride=stride)
            yield Conv2dCase(f"square{name}", 1, size, size, 20, (7, 7), stride)
    for height in (1, 3, 5, 7):
        for width in (1, 3, 5, 7):
            for stride in (1, 2):
                name = f"kernel{height}x{width}-stride{stride}"
                yield Conv2dCase(name, 1, 11, 17, 40, (height, width), stride, bias=False)
    yield Conv2dCase("symmetric", asymmetric=False)
    yield Conv2dCase("extreme", kind="extreme", kernel=(7, 7), height=12, width=12)
    yield Conv2dCase("zeros", kind="zeros")
    yield Conv2dCase("view", view=True, dim=65)
    yield Conv2dCase("view-stride2", view=True, dim=64, kernel=(7, 7), stride=2)
    yield Conv2dCase("batch0", batch=0)
    yield Conv2dCase("height0", height=0)
    yield Conv2dCase("width0", width=0, stride=2)
    yield Conv2dCase("dim0", dim=0)
    # A layer; and several tiles of channels, strips and pieces of a CUDA grid, the last of each cut short.
    yield Conv2dCase("layer", 1, 14, 14, 384)
    yield Conv2dCase("large", 3, 23, 30, 132, (5, 5))
    yield Conv2dCase("large-stride2", 3, 23, 30, 132, (7, 7), 2)


CASES = list(_table())
