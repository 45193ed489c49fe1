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

inline float scale_from_amax(float amax) {
  return (amax > kTinyAmax ? amax : kTinyAmax) / static_cast<float>(kQMax);
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
