"""The operators: typed wrappers of torch.ops.mambaquant, one module per group."""

from mambaquant_ext import _load as _load
from mambaquant_ext.ops.conv1d import causal_conv1d_quantize, causal_conv1d_update_quantize
from mambaquant_ext.ops.quantize import dequantize, quantize, quantize_dynamic
from mambaquant_ext.ops.selective_scan import selective_scan, selective_scan_update

__all__ = [
    "causal_conv1d_quantize",
    "causal_conv1d_update_quantize",
    "dequantize",
    "quantize",
    "quantize_dynamic",
    "selective_scan",
    "selective_scan_update",
]
