// Rounding to the int8 grid, the one place where it is defined for the CUDA kernels:
//   inv_scale = 1 / scale;  q = clamp(rne(x * inv_scale) + zero_point, qmin, 127)
#pragma once

#include <cstdint>

#include "mambaquant/types.h"

namespace mambaquant::cuda {

// 1 / scale, correctly rounded.
__device__ inline float inverse(float scale) { return __frcp_rn(scale); }

// NaN gives 127, like +inf: fminf returns its other operand.
__device__ inline float clamp_q(float q, float qmin) {
  return fmaxf(fminf(q, static_cast<float>(kQMax)), qmin);
}
__device__ inline int8_t quantize_symmetric(float x, float inv_scale) {
  // The bounds are integers, so that rounding after the clamp is rounding before it.
  const float v = clamp_q(__fmul_rn(x, inv_scale), static_cast<float>(kQMinSymmetric));
  return static_cast<int8_t>(__float2int_rn(v));
}
__device__ inline int8_t quantize_clamped(float x, float inv_scale, float zero_point, float qmin) {
  const float q = rintf(__fmul_rn(x, inv_scale)) + zero_point;
  return static_cast<int8_t>(__float2int_rn(clamp_q(q, qmin)));
}
__device__ inline int8_t quantize_asymmetric(float x, float inv_scale, float zero_point) {
  return quantize_clamped(x, inv_scale, zero_point, static_cast<float>(kQMinAsymmetric));
}

__device__ inline float scale_from_amax(float amax) {
  return __fdiv_rn(fmaxf(amax, kTinyAmax), static_cast<float>(kQMax));
}

}  // namespace mambaquant::cuda
