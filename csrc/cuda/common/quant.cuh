// Rounding to the int8 grid, the one place where it is defined for the CUDA kernels:
//   inv_scale = 1 / scale;  q = clamp(rne(x * inv_scale) + zero_point, qmin, 127)
#pragma once

#include <cstdint>

#include "mambaquant/types.h"

namespace mambaquant::cuda {

// 1 / scale, correctly rounded.
__device__ inline float inverse(float scale) { return __frcp_rn(scale); }

// 1.5 * 2^23. v + kRoundShift is kRoundShift + rne(v) for |v| <= 2^22: neighbouring floats are 1 apart
// there, and the low byte of the sum is that of the integer. An addition at full rate takes the place of
// a conversion at a quarter of it. Larger v stay larger than every bound that follows.
inline constexpr float kRoundShift = 12582912.0f;

// The low byte of a sum with kRoundShift, clamped. NaN gives 127, like +inf: fminf returns its other operand.
__device__ inline int8_t clamp_shifted(float q, float qmin) {
  const float at_most = fminf(q, kRoundShift + static_cast<float>(kQMax));
  return static_cast<int8_t>(__float_as_int(fmaxf(at_most, kRoundShift + qmin)));
}
__device__ inline int8_t quantize_symmetric(float x, float inv_scale) {
  const float q = __fadd_rn(__fmul_rn(x, inv_scale), kRoundShift);
  return clamp_shifted(q, static_cast<float>(kQMinSymmetric));
}
// Exact for |zero_point| <= 2^22.
__device__ inline int8_t quantize_clamped(float x, float inv_scale, float zero_point, float qmin) {
  const float q = __fadd_rn(__fmul_rn(x, inv_scale), kRoundShift);
  return clamp_shifted(__fadd_rn(q, zero_point), qmin);
}
__device__ inline int8_t quantize_asymmetric(float x, float inv_scale, float zero_point) {
  return quantize_clamped(x, inv_scale, zero_point, static_cast<float>(kQMinAsymmetric));
}

__device__ inline float scale_from_amax(float amax) {
  return __fdiv_rn(fmaxf(amax, kTinyAmax), static_cast<float>(kQMax));
}

}  // namespace mambaquant::cuda
