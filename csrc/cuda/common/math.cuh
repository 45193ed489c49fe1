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


// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), at most 2^-22 plus what rounding x log2(e) does (|x| 2^-24);
// a small result keeps its relative precision, a large x comes back as it is.
// log1p(e) = e p(e) on [0, 1], p of degree 8 with relative error 3e-8 (least squares, reweighted).
__device__ inline float softplus(float x) {
  const float e = exp2_approx(fabsf(x) * -kLog2E);
  float p = 0.005232679657638073f;
  p = fmaf(p, e, -0.029505178332328796f);
  p = fmaf(p, e, 0.07822585105895996f);
  p = fmaf(p, e, -0.13663236796855927f);
  p = fmaf(p, e, 0.19106002151966095f);
  p = fmaf(p, e, -0.2484298050403595f);
  p = fmaf(p, e, 0.3331909775733948f);
  p = fmaf(p, e, -0.4999949336051941f);
  p = fmaf(p, e, 0.9999999403953552f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

}  // namespace mambaquant::cuda
