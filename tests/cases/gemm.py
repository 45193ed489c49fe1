"""Cases of gemm, gemm_dequantize and gemm_requantize."""

from dataclasses import dataclass
from typing import Any

import torch

from cases import inputs


@dataclass(frozen=True)
class GemmCase:
    name: str
    m: int
    n: int
    k: int
    kind: str = "random"  # random, or extreme: +-127 everywhere, and -128 in one row of a
    per_token: bool = False
    has_acc_offset: bool = False
    has_bias: bool = False
    has_out_zero_point: bool = False
    residual_dtype: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    offset: bool = False

    def operands(self, generator):
        """a, weight."""
        a = torch.randint(-128, 128, (self.m, self.k), generator=generator, dtype=torch.int8)
        weight = inputs.int8((self.n, self.k), generator)
        if self.kind == "extreme":
            # Equal signs along k: the largest sums there are, in both directions.
            a = torch.where(a[:, :1] < 0, -127, 127).to(torch.int8).repeat(1, self.k)
            weight = torch.where(weight[:, :1] < 0, -127, 127).to(torch.int8).repeat(1, self.k)
            a[-1:] = -128
        return (inputs.offset_view(a), inputs.offset_view(weight)) if self.offset else (a, weight)

    def scales(self, generator):
        """a_scale, b_scale, out_scale, and acc_offset, bias, residual, out_zero_point or None."""
        made: dict[str, Any] = {
            "a_scale": inputs.positive((self.m if self.per_token else 1,), generator),
            "b_scale": inputs.positive((self.n,), generator, 1e-3, 1e-2),
            "acc_offset": None,
            "bias": None,
            "residual": None,
            "out_zero_point": None,
        }
        # Most results inside the int8 range, the tails outside.
        spread = 0.055 * 5.5e-3 * 5400 * max(self.k, 1) ** 0.5
        made["out_scale"] = inputs.positive((self.n,), generator, spread / 100, spread / 30)
        if self.has_acc_offset:
            made["acc_offset"] = torch.randint(
                -40000, 40000, (self.n,), generator=generator, dtype=torch.int32
            )
        if self.has_bias:
            made["bias"] = inputs.normal((self.n,), generator)
        if self.residual_dtype is not None:
            residual = inputs.normal((self.m, self.n), generator, self.residual_dtype)
            made["residual"] = inputs.offset_view(residual) if self.offset else residual
        if self.has_out_zero_point:
            made["out_zero_point"] = torch.randint(
                -100, 100, (self.n,), generator=generator, dtype=torch.int32
            )
        return made


# One size at a time around each tile and vector width, the others small: every combination would be
# 2,000 cases.
def _table():
    for k in (1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 768, 5120):
        yield GemmCase(f"k{k}", 7, 33, k, per_token=k % 2 == 1, has_bias=True)
    for n in (1, 15, 16, 17, 31, 32, 63, 64, 65, 80, 129):
        yield GemmCase(f"n{n}", 5, n, 37, has_acc_offset=True, has_out_zero_point=n % 2 == 1)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 64, 250):
        yield GemmCase(f"m{m}", m, 40, 67, per_token=True, residual_dtype=torch.float32)
    for i, dtype in enumerate(inputs.FLOAT_DTYPES):
        for j, residual_dtype in enumerate(inputs.FLOAT_DTYPES):
            name = f"{dtype}-residual-{residual_dtype}".replace("torch.", "")
            yield GemmCase(
                name, 6, 50, 40, per_token=i == j, has_acc_offset=j == 0, has_bias=i == 1,
                residual_dtype=residual_dtype, dtype=dtype,
            )  # fmt: skip
    for k in (64, 5120):
        yield GemmCase(f"extreme-k{k}", 13, 49, k, kind="extreme", has_acc_offset=True)
    # Whole tiles and a narrow one at the edge, without and with what is added to each column and element.
    yield GemmCase("bare", 37, 112, 44)
    yield GemmCase(
        "added", 37, 112, 44, has_acc_offset=True, has_bias=True, residual_dtype=torch.float32
    )
    yield GemmCase("views", 14, 70, 100, per_token=True, residual_dtype=torch.float16, offset=True)
    yield GemmCase("empty-m", 0, 16, 16)
    yield GemmCase("empty-n", 3, 0, 16)
    yield GemmCase("empty-k", 3, 20, 0, has_bias=True)
    yield GemmCase(
        "layer", 70, 384, 768, has_acc_offset=True, has_bias=True, has_out_zero_point=True
    )


CASES = list(_table())


# Around the tiles of the CUDA kernels (32 to 128 rows, 64 to 256 columns, 64 or 128 of depth), where every kernel
# is forced in turn: below, at and above them, columns that vectors fit and that they do not, every output.
def _kernel_table():
    yield GemmCase("one", 1, 1, 16)
    yield GemmCase("k-of-one-vector", 15, 64, 16, has_bias=True, dtype=torch.bfloat16)
    yield GemmCase("full-tiles", 128, 256, 128, residual_dtype=torch.bfloat16, dtype=torch.float16)
    yield GemmCase(
        "above-tiles", 129, 260, 272, per_token=True, has_acc_offset=True, has_bias=True,
        residual_dtype=torch.float32, has_out_zero_point=True,
    )  # fmt: skip
    yield GemmCase(
        "odd-columns",
        33,
        65,
        144,
        has_acc_offset=True,
        residual_dtype=torch.float16,
        dtype=torch.bfloat16,
    )
    yield GemmCase(
        "copied-rows", 31, 63, 131, per_token=True, has_bias=True, has_out_zero_point=True
    )
    yield GemmCase("views", 66, 132, 208, residual_dtype=torch.float32, offset=True)
    yield GemmCase("deep", 40, 72, 1100, kind="extreme", has_acc_offset=True, dtype=torch.float16)


KERNEL_CASES = list(_kernel_table())
