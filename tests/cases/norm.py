"""Cases of rmsnorm_quantize and layernorm_quantize."""

from dataclasses import dataclass

import torch

from cases import inputs


@dataclass(frozen=True)
class NormCase:
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype | None = None
    has_weight: bool = True
    has_bias: bool = True  # LayerNorm only
    static: bool = False
    kind: str = "outliers"  # outliers, zeros, constant, large
    offset: bool = False

    def make(self, generator):
        """The arguments of reference.norm.norm_quantize but subtract_mean, by name."""
        dim = self.shape[1]
        x = inputs.with_outlier_channels(self.shape, generator, self.dtype)
        if self.kind == "zeros":
            x = torch.zeros_like(x)
        if self.kind == "constant":
            x = torch.full_like(x, 3.0)
        if self.kind == "large":
            x = x * 1e15
        residual = None
        if self.residual_dtype is not None:
            residual = inputs.normal(self.shape, generator, self.residual_dtype)
        if self.offset:
            x = inputs.offset_view(x)
            residual = None if residual is None else inputs.offset_view(residual)
        return {
            "x": x,
            "weight": inputs.normal((dim,), generator) if self.has_weight else None,
            "bias": inputs.normal((dim,), generator) if self.has_bias else None,
            "residual": residual,
            "scale": inputs.positive((1,), generator) if self.static else None,
            "eps": 1e-5,
        }


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _table():
    # Beyond one vector: around the block of four vectors that the accumulators take.
    for dim in [*inputs.DIMS, 63, 64, 65, 127, 129, 1536]:
        yield NormCase(f"dim{dim}", (3, dim))
    for dtype in inputs.FLOAT_DTYPES:
        yield NormCase(f"{_name(dtype)}", (4, 100), dtype)
        for residual_dtype in inputs.FLOAT_DTYPES:
            name = f"{_name(dtype)}-residual-{_name(residual_dtype)}"
            yield NormCase(name, (4, 100), dtype, residual_dtype)
    for static in (False, True):
        suffix = "static" if static else "dynamic"
        yield NormCase(f"plain-{suffix}", (4, 77), has_weight=False, has_bias=False, static=static)
        yield NormCase(f"no-weight-{suffix}", (4, 77), has_weight=False, static=static)
        yield NormCase(f"no-bias-{suffix}", (4, 77), has_bias=False, static=static)
        yield NormCase(
            f"offset-{suffix}", (5, 41), torch.bfloat16, torch.float32, static=static, offset=True
        )
        yield NormCase(
            f"empty-tokens-{suffix}", (0, 32), torch.float16, torch.float16, static=static
        )
    yield NormCase("empty-dim", (3, 0))
    yield NormCase("zeros", (3, 40), kind="zeros")
    yield NormCase("constant", (3, 40), kind="constant", has_weight=False, has_bias=False)
    yield NormCase("large", (3, 100), kind="large", residual_dtype=torch.float32)
    yield NormCase("many-tokens", (600, 48), torch.float16, torch.float16)
    yield NormCase("widest", (1, 65536), torch.float16, torch.float32)
    # Around what a CUDA block holds: rows of 16 or 24 elements a thread, exactly or not, several rows of several
    # warps a block, and rows beyond it.
    for dim in (512, 768, 776, 1536):
        yield NormCase(f"dim{dim}-bfloat16", (3, dim), torch.bfloat16, torch.bfloat16)
    yield NormCase("rows-share-a-block", (230, 640), torch.float16)
    yield NormCase("longest-in-registers", (2, 10240), torch.float16, torch.float32)
    yield NormCase("too-long-for-registers", (2, 12292), static=True)
    yield NormCase("too-long-offset", (2, 5123), torch.float16, torch.bfloat16, offset=True)


CASES = list(_table())
