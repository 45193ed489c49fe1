// exp, softplus and SiLU on the device, on the hardware's approximations of 2^x and 1/x.
// Errors are stated relative to the result.
#pragma once

namespace mambaquant::cuda {

inline constexpr float kLog2E = 1.44269504088896341f;

// 2^x, at most 2^-22; subnormal results become 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), at most 2^-21 plus what rounding x log2(e) does (|x| 2^-24); a
// small result keeps its relative precision, a large x comes back as it is.
// log1p(e) = e p(e) on [0, 1], p of degree 7 with relative error 2e-7 (least squares, reweighted).
__device__ inline float softplus(float x) {
  const float e = exp2_approx(fabsf(x) * -kLog2E);
  float p = -0.008539184927940369f;
  p = fmaf(p, e, 0.04408954828977585f);
  p = fmaf(p, e, -0.10768159478902817f);
  p = fmaf(p, e, 0.17745232582092285f);
  p = fmaf(p, e, -0.24495460093021393f);
  p = fmaf(p, e, 0.33275479078292847f);
  p = fmaf(p, e, -0.4999740421772003f);
  p = fmaf(p, e, 0.9999998211860657f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

}  // namespace mambaquant::cuda
