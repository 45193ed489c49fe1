// Rounding to the int8 grid, the one place where it is defined for the CUDA kernels:
//   inv_scale = 1 / scale;  q = clamp(rne(x * inv_scale) + zero_point, qmin, 127)
#pragma once

#include <cstdint>

#include "cuda/common/bytes.cuh"
#include "mambaquant/types.h"

namespace mambaquant::cuda {

// 1 / scale, correctly rounded.
__device__ inline float inverse(float scale) { return __frcp_rn(scale); }

// A sum with kRounder (NOTE(shifted-integers)), clamped; its low byte is q. Larger sums are beyond the bounds.
// NaN gives 127, like +inf: fminf returns its other operand.
__device__ inline uint32_t clamp_shifted(float q, float qmin) {
  const float at_most = fminf(q, kRounder + static_cast<float>(kQMax));
  return __float_as_uint(fmaxf(at_most, kRounder + qmin));
}
// An integer whose lowest byte is q.
__device__ inline uint32_t quantize_symmetric_bits(float x, float inv_scale) {
  const float q = __fadd_rn(__fmul_rn(x, inv_scale), kRounder);
  return clamp_shifted(q, static_cast<float>(kQMinSymmetric));
}
__device__ inline int8_t quantize_symmetric(float x, float inv_scale) {
  return static_cast<int8_t>(quantize_symmetric_bits(x, inv_scale));
}
// Exact for |zero_point| <= 2^22.
__device__ inline int8_t quantize_clamped(float x, float inv_scale, float zero_point, float qmin) {
  const float q = __fadd_rn(__fmul_rn(x, inv_scale), kRounder);
  return static_cast<int8_t>(clamp_shifted(__fadd_rn(q, zero_point), qmin));
}
__device__ inline float scale_from_amax(float amax) {
  return __fdiv_rn(fmaxf(amax, kTinyAmax), static_cast<float>(kQMax));
}

}  // namespace mambaquant::cuda
