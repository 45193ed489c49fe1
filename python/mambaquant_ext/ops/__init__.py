"""The operators: typed wrappers of torch.ops.mambaquant, one module per group."""

from mambaquant_ext import _load as _load
from mambaquant_ext.ops.conv1d import causal_conv1d_quantize, causal_conv1d_update_quantize
from mambaquant_ext.ops.conv2d import depthwise_conv2d_quantize
from mambaquant_ext.ops.gemm import gemm, gemm_dequantize, gemm_requantize, pack_gemm_weight
from mambaquant_ext.ops.hadamard import (
    hadamard_matrix,
    hadamard_quantize,
    hadamard_transform,
    supported_hadamard_sizes,
)
from mambaquant_ext.ops.norm import layernorm_quantize, rmsnorm_quantize
from mambaquant_ext.ops.quantize import dequantize, quantize, quantize_dynamic
from mambaquant_ext.ops.selective_scan import selective_scan, selective_scan_update

__all__ = [
    "causal_conv1d_quantize",
    "causal_conv1d_update_quantize",
    "depthwise_conv2d_quantize",
    "dequantize",
    "gemm",
    "gemm_dequantize",
    "gemm_requantize",
    "hadamard_matrix",
    "hadamard_quantize",
    "hadamard_transform",
    "layernorm_quantize",
    "pack_gemm_weight",
    "quantize",
    "quantize_dynamic",
    "rmsnorm_quantize",
    "selective_scan",
    "selective_scan_update",
    "supported_hadamard_sizes",
]
