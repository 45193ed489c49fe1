"""The microbenchmark cases, one module per group; each has cases(preset) -> Iterator[BenchCase]."""

from bench.ops import conv1d, quantize, selective_scan

MODULES = [conv1d, quantize, selective_scan]
