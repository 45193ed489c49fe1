// quantize, dequantize: float <-> int8, per tensor, per token or per channel.
//   q[t,c] = clamp(rne(x[t,c] * inv_scale) + zero_point, qmin, 127),  inv_scale = 1 / scale
//   x[t,c] = (q[t,c] - zero_point) * scale
// qmin is -127 without a zero_point (symmetric) and -128 with one. NaN saturates to 127.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

enum class Granularity : int32_t { kPerTensor = 0, kPerToken = 1, kPerChannel = 2 };

struct QuantizeParams {
  int64_t tokens = 0, dim = 0;
  int64_t x_stride_token = 0;  // elements; the last dim is contiguous
  DType x_dtype = DType::kF32;
  Granularity granularity = Granularity::kPerTensor;
  const void* x = nullptr;              // (tokens, dim)
  const float* scale = nullptr;         // (1,), (tokens,) or (dim,); null: dynamic
  const int32_t* zero_point = nullptr;  // as scale; null: symmetric
  int8_t* q = nullptr;                  // (tokens, dim), contiguous
  float* scale_out = nullptr;           // dynamic only: (1,), (tokens,) or (dim,)
};

struct DequantizeParams {
  int64_t tokens = 0, dim = 0;
  int64_t q_stride_token = 0;  // elements
  DType x_dtype = DType::kF32;
  Granularity granularity = Granularity::kPerTensor;
  const int8_t* q = nullptr;            // (tokens, dim)
  const float* scale = nullptr;         // (1,), (tokens,) or (dim,)
  const int32_t* zero_point = nullptr;  // as scale; null: symmetric
  void* x = nullptr;                    // (tokens, dim), contiguous
};

namespace cpu {
Status quantize(const QuantizeParams& p, const Threads& threads);
Status dequantize(const DequantizeParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
Status quantize(const QuantizeParams& p, Stream stream);
Status dequantize(const DequantizeParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
