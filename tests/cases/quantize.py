"""Cases of quantize, quantize_dynamic and dequantize."""

from dataclasses import dataclass

import torch

from cases import inputs


@dataclass(frozen=True)
class QuantizeCase:
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    axis: int | None = None
    asymmetric: bool = False
    kind: str = "outliers"  # outliers, zeros, subnormal, special
    offset: bool = False

    def make(self, generator):
        """x, scale, zero_point."""
        x = inputs.with_outlier_channels(self.shape, generator, self.dtype)
        if self.kind == "zeros":
            x = torch.zeros_like(x)
        if self.kind == "subnormal":
            x = (x.float() * 1e-41).to(self.dtype)
        if self.kind == "special":
            x.view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0]).to(self.dtype)
        if self.offset:
            x = inputs.offset_view(x)
        count = 1 if self.axis is None else self.shape[self.axis]
        scale = inputs.positive((count,), generator)
        zero_point = None
        if self.asymmetric:
            zero_point = torch.randint(-100, 100, (count,), generator=generator, dtype=torch.int32)
        return x, scale, zero_point


def _table():
    for dim in inputs.DIMS:
        yield QuantizeCase(f"dim{dim}", (5, dim))
    for axis in (None, 0, 1):
        for dtype in inputs.FLOAT_DTYPES:
            yield QuantizeCase(f"axis{axis}-{dtype}"[:-2], (3, 37), dtype, axis)
        yield QuantizeCase(f"axis{axis}-asymmetric", (4, 100), axis=axis, asymmetric=True)
        yield QuantizeCase(f"axis{axis}-offset", (6, 33), axis=axis, offset=True)
        yield QuantizeCase(f"axis{axis}-special", (3, 19), axis=axis, kind="special")
    yield QuantizeCase("empty-tokens", (0, 16))
    yield QuantizeCase("empty-dim", (3, 0), axis=0)
    yield QuantizeCase("zeros", (3, 40), axis=0, kind="zeros")
    yield QuantizeCase("subnormal", (3, 40), axis=0, kind="subnormal")
    yield QuantizeCase("many-tokens", (700, 65), axis=0)
    # Around the CUDA kernels' tiles: 32 lanes of 4 or 8 elements, four vectors a thread, 128 tokens a block,
    # rows of 16 elements a thread and rows that no block can hold.
    for axis in (None, 0, 1):
        yield QuantizeCase(f"axis{axis}-tile", (130, 264), torch.float16, axis, asymmetric=True)
        yield QuantizeCase(f"axis{axis}-several-tiles", (3, 1540), torch.float32, axis)
    yield QuantizeCase("row-fills-warps", (5, 1024), torch.bfloat16, axis=0)
    yield QuantizeCase("row-too-long", (2, 16392), torch.float16, axis=0)
    yield QuantizeCase("row-too-long-offset", (2, 16387), axis=0, offset=True)


CASES = list(_table())
