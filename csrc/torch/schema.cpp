// Every operator of torch.ops.mambaquant, sorted by group: the only TORCH_LIBRARY block. Shapes, dtypes and
// meaning are documented with the Python wrappers (python/mambaquant_ext/ops).
#include <torch/library.h>

#include "torch/language_model.h"
#include "torch/sampler.h"

TORCH_LIBRARY(mambaquant, m) {
  // quantize. axis: none = per tensor, 0 = per token, 1 = per channel
  m.def("quantize(Tensor x, Tensor scale, Tensor? zero_point, int? axis) -> Tensor");
  m.def("quantize_dynamic(Tensor x, int? axis) -> (Tensor q, Tensor scale)");
  m.def(
      "dequantize(Tensor q, Tensor scale, Tensor? zero_point, int? axis, ScalarType dtype) -> Tensor");

  // norm. scale given: static per tensor, scale out is empty; scale absent: dynamic per token, (tokens,).
  // residual given: x + residual is normalised and returned in residual's dtype; absent: residual out is empty.
  m.def(
      "rmsnorm_quantize(Tensor x, Tensor? weight, Tensor? residual, Tensor? scale, float eps)"
      " -> (Tensor q, Tensor scale, Tensor residual)");
  m.def(
      "layernorm_quantize(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? scale, float eps)"
      " -> (Tensor q, Tensor scale, Tensor residual)");

  // hadamard. Orthonormal transform of the last dim: x H, or x H^T with inverse.
  m.def("hadamard_transform(Tensor x, bool inverse) -> Tensor");
  m.def("hadamard_quantize(Tensor x, Tensor? scale) -> (Tensor q, Tensor scale)");

  // gemm. a (M, K) int8, weight (N, K) int8 packed once; layout names the packing, and a backend refuses a
  // layout that it does not read. acc_offset[n] = sum_k zero_point[k] * weight[n, k].
  m.def("pack_gemm_weight(Tensor weight) -> (Tensor packed, int layout)");
  m.def("gemm(Tensor a, Tensor packed, int layout, int n) -> Tensor");
  m.def(
      "gemm_dequantize(Tensor a, Tensor packed, int layout, Tensor a_scale, Tensor b_scale, Tensor? acc_offset,"
      " Tensor? bias, Tensor? residual, ScalarType dtype) -> Tensor");
  m.def(
      "gemm_requantize(Tensor a, Tensor packed, int layout, Tensor a_scale, Tensor b_scale, Tensor? acc_offset,"
      " Tensor? bias, Tensor out_scale, Tensor? out_zero_point) -> Tensor");

  // conv1d. Depthwise, causal, then SiLU: x (batch, seqlen, dim) int8; states (batch, width - 1, dim) int8.
  m.def(
      "causal_conv1d_quantize(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias,"
      " Tensor out_scale, Tensor? out_zero_point, Tensor? initial_state, bool reverse,"
      " Tensor? order) -> (Tensor q, Tensor final_state)");
  m.def(
      "causal_conv1d_update_quantize(Tensor x, Tensor(a!) conv_state, Tensor x_scale, Tensor weight,"
      " Tensor weight_scale, Tensor? bias, Tensor out_scale, Tensor? out_zero_point) -> Tensor");

  // conv2d. Depthwise over an image with zeros around it, then SiLU: x (batch, height, width, dim) int8.
  m.def(
      "depthwise_conv2d_quantize(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias,"
      " Tensor out_scale, Tensor? out_zero_point, int stride) -> Tensor");

  // selective_scan. x, B, C, z int8 with scales; dt float before softplus; state float32 (batch, dstate, dim).
  // order: the walk over the tokens, a permutation (seqlen,) int32; addend: joins y before the gate.
  m.def(
      "selective_scan(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor dt, Tensor? dt_bias, Tensor A,"
      " Tensor B, Tensor? B_scale, Tensor C, Tensor? C_scale, Tensor? D, Tensor? z, Tensor? z_scale,"
      " Tensor? gate_scale, Tensor? readout_scale, bool rotate_state, Tensor? initial_state, bool reverse,"
      " Tensor? order, Tensor? addend, int chunk_size, ScalarType dtype) -> (Tensor y, Tensor final_state)");
  m.def(
      "selective_scan_update(Tensor(a!) ssm_state, Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor dt,"
      " Tensor? dt_bias, Tensor A, Tensor B, Tensor? B_scale, Tensor C, Tensor? C_scale, Tensor? D, Tensor? z,"
      " Tensor? z_scale, Tensor? gate_scale, Tensor? readout_scale, bool rotate_state, ScalarType dtype)"
      " -> Tensor");

  // A whole language model as one object (python/mambaquant_ext/run/runner.py).
  mambaquant::binding::register_language_model(m);
  // Draws its next tokens (python/mambaquant_ext/generation/sampler.py).
  mambaquant::binding::register_sampler(m);
}
