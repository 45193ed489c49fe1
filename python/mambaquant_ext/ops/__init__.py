"""The operators: typed wrappers of torch.ops.mambaquant, one module per group."""

from mambaquant_ext import _load as _load
from mambaquant_ext.ops.gemm import gemm, gemm_dequantize, gemm_requantize, pack_gemm_weight
from mambaquant_ext.ops.quantize import dequantize, quantize, quantize_dynamic

__all__ = [
    "dequantize",
    "gemm",
    "gemm_dequantize",
    "gemm_requantize",
    "pack_gemm_weight",
    "quantize",
    "quantize_dynamic",
]
