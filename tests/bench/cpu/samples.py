"""Measurements that were never taken: seconds per call, round by round, and ratios of kernels."""

from bench.cpu.bars import PEER
from bench.cpu.engines import OURS
from bench.cpu.plan import Figure
from bench.roofs import Roofs
from bench.shapes import LANGUAGE_MODELS

M130 = LANGUAGE_MODELS["mamba-130m"]
ROOFS = Roofs({"L2": 4e9, "L3": 2e9, "memory": 1e9}, {"int8": 8e9, "float32": 1e9}, 5.0, 2e9)


def prefill(tokens, batch=1):
    return Figure("prefill", M130.name, 2, batch, tokens)


def decode(batch):
    return Figure("decode", M130.name, 2, batch, 1)


def samples_of(**changed):
    """Seconds per call, round by round: ours, and the peer that the bars name."""
    found = {
        prefill(512): {OURS: [0.1, 0.2], PEER: [0.8, 1.6, 9.9]},
        prefill(8192): {OURS: [1.6, 3.2]},
        decode(1): {OURS: [0.004, 0.004, 0.005], PEER: [0.006, 0.006, 0.006]},
        decode(8): {OURS: [0.008, 0.008, 0.008]},
    }
    return {**found, **changed}


GEMM, SCAN_ROW = "gemm_requantize", "selective_scan"


def kernel(op, shape, **times_baseline):
    names = {
        "int_mm": "torch._int_mm, no epilogue",
        "eager": "torch eager",
        "compiled": "torch.compile",
    }
    ratios = {names.get(name, name): ratio for name, ratio in times_baseline.items()}
    return {"op": op, "shape": shape, "times_baseline": ratios}


KERNELS = [
    kernel(GEMM, "mamba-130m in_proj 1x3072x768", int_mm=0.1),  # a decode step: no bar is for it
    kernel(GEMM, "mamba-130m in_proj 64x3072x768", int_mm=1.5),
    kernel(GEMM, "mamba-130m x_proj 512x80x1536", int_mm=0.9),
    kernel(SCAN_ROW, "mamba-130m 64x1536 rotated int8", eager=3.0),
    kernel(SCAN_ROW, "mamba-130m 512x1536 int8", eager=2.0),
    kernel(SCAN_ROW, "mamba-130m 512x1536 rotated int8", eager=20.0, compiled=12.0, mambapy=90.0, copy=1.0),
]  # fmt: skip
