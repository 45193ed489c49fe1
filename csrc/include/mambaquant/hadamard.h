// hadamard_transform, hadamard_quantize: y = x H / sqrt(dim) along the last dim, and int8 of it.
//   dim = m * 2^k,  H = H_m (x) H_{2^k}: column i * 2^k + j belongs to block i, position j.
//   H_{2^k} is Sylvester's matrix in natural order, H_m one of hadamard_base.h.
//   q = clamp(rne(y / scale), -127, 127), scale given or max(max|y|, tiny) / 127 per token.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

// Largest dim; a row of floats is then 128 KiB.
inline constexpr int64_t kMaxHadamardDim = 32768;

struct HadamardParams {
  int64_t tokens = 0, dim = 0;
  int64_t x_stride_token = 0;  // elements; the last dim is contiguous
  int64_t base_order = 1;      // m
  DType x_dtype = DType::kF32;
  bool inverse = false;          // x H^T; transform only
  const void* x = nullptr;       // (tokens, dim)
  void* y = nullptr;             // transform: (tokens, dim) in x's dtype, contiguous
  const float* scale = nullptr;  // quantize: (1,), static; null: dynamic per token
  int8_t* q = nullptr;           // quantize: (tokens, dim), contiguous
  float* scale_out = nullptr;    // quantize: (tokens,), dynamic only
};

namespace cpu {
Status hadamard_transform(const HadamardParams& p, const Threads& threads);
Status hadamard_quantize(const HadamardParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
Status hadamard_transform(const HadamardParams& p, Stream stream);
Status hadamard_quantize(const HadamardParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
