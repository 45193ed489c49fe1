"""The microbenchmark cases, one module per group; each has cases(preset) -> Iterator[BenchCase]."""

from bench.ops import gemm, hadamard, norm, quantize

MODULES = [gemm, hadamard, norm, quantize]
