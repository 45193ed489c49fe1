"""Float in, float out: transforms that leave the model's function unchanged and its tensors easy to quantize."""

from mambaquant_ext.transform.apply import needs_folded_norms, transform, transform_layer
from mambaquant_ext.transform.norms import fold_final_norm, fold_norm
from mambaquant_ext.transform.rotate import (
    klt_rotation,
    rotate_dt,
    rotate_out,
    rotate_residual_ends,
    rotate_residual_layer,
    rotate_state,
)
from mambaquant_ext.transform.smooth import (
    center_dt,
    smooth_dt,
    smooth_gate,
    smooth_in,
    smooth_state,
    smoothing_scale,
)

__all__ = [
    "center_dt",
    "fold_final_norm",
    "fold_norm",
    "klt_rotation",
    "needs_folded_norms",
    "rotate_dt",
    "rotate_out",
    "rotate_residual_ends",
    "rotate_residual_layer",
    "rotate_state",
    "smooth_dt",
    "smooth_gate",
    "smooth_in",
    "smooth_state",
    "smoothing_scale",
    "transform",
    "transform_layer",
]
