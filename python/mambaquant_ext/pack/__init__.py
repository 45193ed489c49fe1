"""Float blocks and ranges in, int8 tensors and scales out."""

from mambaquant_ext.pack.model import pack_block, pack_blocks, pack_head, pack_linear
from mambaquant_ext.pack.weights import quantize_weight

__all__ = ["pack_block", "pack_blocks", "pack_head", "pack_linear", "quantize_weight"]
