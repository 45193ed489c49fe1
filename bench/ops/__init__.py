"""The microbenchmark cases, one module per group; each has cases(preset) -> Iterator[BenchCase]."""

from bench.ops import gemm, quantize

MODULES = [gemm, quantize]
