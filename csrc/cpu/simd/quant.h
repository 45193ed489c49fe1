// Rounding to the int8 grid, the one place where it is defined for the CPU kernels:
//   inv_scale = 1 / scale;  q = clamp(rne(x * inv_scale) + zero_point, qmin, 127)
#pragma once

#include "cpu/simd/simd.h"
#include "mambaquant/types.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

// Integer-valued; NaN gives 127 (min and max return their second operand), like +inf.
inline F32 quantize_symmetric(F32 x, F32 inv_scale) {
  const F32 limit = set1(static_cast<float>(kQMax));
  return max(min(round_even(x * inv_scale), limit), set1(static_cast<float>(kQMinSymmetric)));
}
// With the qmin of the caller, for code that serves both kinds.
inline F32 quantize_clamped(F32 x, F32 inv_scale, F32 zero_point, F32 qmin) {
  const F32 q = round_even(x * inv_scale) + zero_point;
  return max(min(q, set1(static_cast<float>(kQMax))), qmin);
}
inline F32 quantize_asymmetric(F32 x, F32 inv_scale, F32 zero_point) {
  return quantize_clamped(x, inv_scale, zero_point, set1(static_cast<float>(kQMinAsymmetric)));
}

// q of one vector, or of four neighbouring ones, stored. The store rounds; the bounds are integers,
// so that it may do so after the clamp.
inline F32 clamp_symmetric(F32 x, F32 inv_scale) {
  const F32 limit = set1(static_cast<float>(kQMax));
  return max(min(x * inv_scale, limit), set1(static_cast<float>(kQMinSymmetric)));
}
inline void store_symmetric(int8_t* q, F32 x, F32 inv_scale) {
  store(q, clamp_symmetric(x, inv_scale));
}
inline void store_symmetric(int8_t* q, F32 x, F32 inv_scale, int64_t n) {
  store(q, clamp_symmetric(x, inv_scale), n);
}
inline void store4_symmetric(int8_t* q, F32 a, F32 b, F32 c, F32 d, F32 inv_scale) {
  store4(q, clamp_symmetric(a, inv_scale), clamp_symmetric(b, inv_scale),
         clamp_symmetric(c, inv_scale), clamp_symmetric(d, inv_scale));
}

inline float scale_from_amax(float amax) {
  return (amax > kTinyAmax ? amax : kTinyAmax) / static_cast<float>(kQMax);
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
