"""Cases of hadamard_transform and hadamard_quantize."""

from dataclasses import dataclass

import torch

from cases import inputs


@dataclass(frozen=True)
class HadamardCase:
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    static: bool = False
    kind: str = "outliers"  # outliers, zeros, extreme
    offset: bool = False

    def make(self, generator):
        """x, scale."""
        x = inputs.with_outlier_channels(self.shape, generator, self.dtype)
        if self.kind == "zeros":
            x = torch.zeros_like(x)
        if (
            self.kind == "extreme"
        ):  # row 0 gives the largest result that the dtype and float32's sums hold
            size = self.shape[1]
            limit = min(0.99 * torch.finfo(self.dtype).max / size**0.5, 1e38 / size)
            x = (torch.sign(x.float()) * limit).to(self.dtype)
            x[0] = limit
        if self.offset:
            x = inputs.offset_view(x)
        return x, torch.tensor([0.37]) if self.static else None


# Every base order; blocks below, at and above a vector (8 and 16 lanes); the sizes of real layers.
SIZES = [1, 2, 4, 8, 16, 32, 64, 256, 512, 2048, 8192, 12, 24, 48, 96, 192, 384, 768, 1536, 3072]
SIZES += [20, 40, 160, 5120, 28, 56, 3584, 36, 144, 44, 352, 52, 208, 60, 960]


def _table():
    for size in SIZES:
        yield HadamardCase(f"size{size}", (3, size))
    for dtype in inputs.FLOAT_DTYPES:
        name = str(dtype).removeprefix("torch.")
        for size in (24, 320, 1024):
            yield HadamardCase(f"{name}-{size}-static", (4, size), dtype, static=True)
        yield HadamardCase(f"{name}-offset", (4, 96), dtype, offset=True)
        yield HadamardCase(f"{name}-extreme", (4, 448), dtype, kind="extreme")
    yield HadamardCase("zeros", (3, 192), kind="zeros")
    yield HadamardCase("empty-tokens", (0, 192))
    yield HadamardCase("many-tokens", (300, 80), torch.float16)


CASES = list(_table())
