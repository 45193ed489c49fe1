"""Float model and ranges in, int8 tensors and scales out."""

from mambaquant_ext.pack.model import pack, pack_block
from mambaquant_ext.pack.weights import quantize_weight

__all__ = ["pack", "pack_block", "quantize_weight"]
