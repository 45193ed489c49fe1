"""The microbenchmark cases, one module per group; each has cases(preset) -> Iterator[BenchCase]."""

from bench.ops import conv1d, conv2d, gemm, hadamard, norm, quantize, selective_scan

MODULES = [conv1d, conv2d, gemm, hadamard, norm, quantize, selective_scan]
