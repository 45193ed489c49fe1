// norm_quantize: residual add, RMSNorm or LayerNorm, and int8 in one pass over the tokens.
//   s = x                                          without residual
//   s = round(x + residual) to residual's dtype    with it; also written to residual_out
//   y = (s - mean) * rstd * weight + bias          mean and bias are 0 for RMSNorm
//   rstd = 1 / sqrt(mean over c of (s - mean)^2 + eps)
//   q = clamp(rne(y / scale), -127, 127)           scale given, or max(max|y|, tiny) / 127 per
//   token
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

struct NormQuantizeParams {
  int64_t tokens = 0, dim = 0;
  int64_t x_stride_token = 0, residual_stride_token = 0;  // elements; the last dim is contiguous
  DType x_dtype = DType::kF32;
  DType residual_dtype = DType::kF32;  // of residual and residual_out
  bool subtract_mean = false;          // LayerNorm
  float eps = 1e-5f;
  const void* x = nullptr;         // (tokens, dim)
  const void* residual = nullptr;  // (tokens, dim) or null
  const float* weight = nullptr;   // (dim,) or null: 1
  const float* bias = nullptr;     // (dim,) or null: 0
  const float* scale = nullptr;    // (1,), static; null: dynamic per token
  int8_t* q = nullptr;             // (tokens, dim), contiguous
  float* scale_out = nullptr;      // (tokens,); dynamic only
  void* residual_out = nullptr;    // (tokens, dim), contiguous; with residual only
};

namespace cpu {
Status norm_quantize(const NormQuantizeParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
Status norm_quantize(const NormQuantizeParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
