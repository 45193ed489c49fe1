"""Cases of causal_conv1d_quantize and causal_conv1d_update_quantize."""

from dataclasses import dataclass, replace

import torch

from cases import inputs


@dataclass(frozen=True)
class ConvCase:
    name: str
    batch: int = 2
    seqlen: int = 5
    dim: int = 33
    width: int = 4
    bias: bool = True
    asymmetric: bool = True
    state: bool = False
    reverse: bool = False
    kind: str = "uniform"  # uniform, extreme, zeros
    view: bool = False
    order: str | None = None  # columns (of a grid of two rows), random

    def make(self, generator):
        """The keyword arguments of causal_conv1d_quantize."""
        shape = (self.batch, self.seqlen, self.dim)
        x = inputs.int8(shape, generator)
        weight = inputs.int8((self.width, self.dim), generator)
        if self.kind == "extreme":
            x = torch.where(x > 0, 127, -127).to(torch.int8)
            weight = torch.full_like(weight, 127)
        if self.kind == "zeros":
            x = torch.zeros_like(x)
        if self.view:  # the left columns of a wider buffer, as in_proj's output gives them
            wide = torch.full((self.batch, self.seqlen + 1, 2 * self.dim), 99, dtype=torch.int8)
            wide[:, 1:, : self.dim] = x
            x = wide[:, 1:, : self.dim]
        channels = (self.dim,)
        zero_point = torch.randint(-128, 128, channels, generator=generator, dtype=torch.int32)
        state = inputs.int8((self.batch, self.width - 1, self.dim), generator)
        return {
            "x": x,
            "x_scale": inputs.positive(channels, generator),
            "weight": weight,
            "weight_scale": inputs.positive(channels, generator, 0.001, 0.01),
            "bias": inputs.normal(channels, generator) if self.bias else None,
            "out_scale": inputs.positive(channels, generator),
            "out_zero_point": zero_point if self.asymmetric else None,
            "initial_state": state if self.state else None,
            "reverse": self.reverse,
            "order": self.make_order(generator),
        }

    def make_order(self, generator):
        if self.order == "random":
            return torch.randperm(self.seqlen, generator=generator, dtype=torch.int32)
        if self.order == "columns":
            return torch.arange(self.seqlen, dtype=torch.int32).view(2, -1).T.reshape(-1)
        return None


def _table():
    for dim in inputs.DIMS:
        yield ConvCase(f"dim{dim}", dim=dim)
    # Around the width, one token, and around the tile of 64 tokens.
    for seqlen in (0, 1, 2, 3, 4, 63, 64, 65, 130):
        yield ConvCase(f"seqlen{seqlen}", seqlen=seqlen, state=True)
        yield ConvCase(
            f"seqlen{seqlen}-reverse", seqlen=seqlen, state=seqlen % 2 == 0, reverse=True
        )
    for width in (2, 3, 4):
        yield ConvCase(f"width{width}", width=width, bias=False)
        yield ConvCase(f"width{width}-state", width=width, state=True, asymmetric=False)
    yield ConvCase("symmetric", asymmetric=False, seqlen=40)
    yield ConvCase("extreme", kind="extreme", seqlen=40)
    yield ConvCase("zeros", kind="zeros")
    yield ConvCase("view", view=True, seqlen=70, dim=65)
    yield ConvCase("view-reverse", view=True, seqlen=70, dim=65, reverse=True)
    # Each side of a tile of 64 tokens and of a chunk; widths that reach over its end.
    for seqlen in (0, 1, 2, 4, 64, 65, 130):
        yield ConvCase(f"order-seqlen{seqlen}", seqlen=seqlen, state=True, order="random")
    for width in (2, 3, 4):
        case = ConvCase(f"order-width{width}", seqlen=70, width=width, order="columns")
        yield case
        yield replace(case, name=f"{case.name}-reverse", reverse=True, state=True, asymmetric=False)
    yield ConvCase("order-view", view=True, seqlen=70, dim=65, order="random")
    yield ConvCase("batch0", batch=0)
    yield ConvCase("dim0", dim=0)
    yield ConvCase("layer", batch=1, seqlen=130, dim=768)
    # Several chunks, warps and slices of a CUDA grid, with a tile of 32 lanes of 4 channels and a part of one.
    yield ConvCase("long", batch=3, seqlen=300, dim=132, state=True)
    yield ConvCase("long-reverse", batch=3, seqlen=300, dim=132, width=3, reverse=True)
    yield ConvCase("long-order", batch=3, seqlen=300, dim=132, state=True, order="random")
    yield ConvCase("long-order-reverse", 3, 300, 132, 3, reverse=True, order="columns")
    yield ConvCase("many-sequences", batch=70, seqlen=1, dim=132, state=True)
    yield ConvCase("many-short-sequences", batch=70, seqlen=2, dim=36, width=3, state=True)


CASES = list(_table())
