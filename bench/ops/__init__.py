"""The microbenchmark cases, one module per group; each has cases(preset) -> Iterator[BenchCase]."""

from bench.ops import hadamard, norm, quantize

MODULES = [hadamard, norm, quantize]
