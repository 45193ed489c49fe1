"""Float in, float out: transforms that leave the model's function unchanged and its tensors easy to quantize."""

from mambaquant_ext.transform.apply import (
    StreamRotation,
    needs_folded_norms,
    stream_rotation,
    transform,
    transform_layer,
    transform_layers,
)
from mambaquant_ext.transform.norms import fold_final_norm, fold_norm
from mambaquant_ext.transform.rotate import (
    center,
    klt_rotation,
    pad_dt,
    rotatable_rank,
    rotate_dt,
    rotate_in,
    rotate_out,
    rotate_residual_ends,
    rotate_residual_layer,
    rotate_state,
)
from mambaquant_ext.transform.smooth import (
    can_smooth_gate,
    center_dt,
    smooth_dt,
    smooth_gate,
    smooth_in,
    smooth_state,
    smoothing_scale,
)

__all__ = [
    "StreamRotation",
    "can_smooth_gate",
    "center",
    "center_dt",
    "fold_final_norm",
    "fold_norm",
    "klt_rotation",
    "needs_folded_norms",
    "pad_dt",
    "rotatable_rank",
    "rotate_dt",
    "rotate_in",
    "rotate_out",
    "rotate_residual_ends",
    "rotate_residual_layer",
    "rotate_state",
    "smooth_dt",
    "smooth_gate",
    "smooth_in",
    "smooth_state",
    "smoothing_scale",
    "stream_rotation",
    "transform",
    "transform_layer",
    "transform_layers",
]
