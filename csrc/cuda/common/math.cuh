// exp, softplus and SiLU on the device, on the hardware's approximations of 2^x, log2 x and 1/x.
// Errors are stated relative to the result.
#pragma once

namespace mambaquant::cuda {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

// 2^x, at most 2^-22; subnormal results become 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2 x, at most 2^-22 away from it in absolute terms for x in [0.5, 2], relative outside.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1/x, at most 1 ulp.
__device__ inline float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(x * -kLog2E)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }

}  // namespace mambaquant::cuda
