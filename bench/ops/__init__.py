"""The microbenchmark cases, one module per group; each has cases(preset) -> Iterator[BenchCase]."""

from bench.ops import conv1d, gemm, hadamard, norm, quantize, selective_scan

MODULES = [conv1d, gemm, hadamard, norm, quantize, selective_scan]
