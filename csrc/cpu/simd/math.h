// exp, softplus and SiLU over vectors. Polynomials are minimax fits (Remez exchange in 40 digits).
#pragma once

#include "cpu/simd/simd.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

// e^x, at most 2 ulp for x in [-87.3, 88.3]; arguments outside are clamped, so that the result is never
// zero, infinite or NaN (1.2e-38 stands for everything smaller).
// x = n ln2 + r, |r| <= ln2/2; e^r = 1 + r + r^2 p(r), p of degree 4 with relative error 3e-9.
inline F32 exp(F32 x) {
  x = max(min(x, set1(88.3f)), set1(-87.3f));
  const F32 n = round_even(x * set1(1.44269504088896341f));
  F32 r = fnma(n, set1(0.693145751953125f), x);   // ln2, high part: 17 bits, n * high exact
  r = fnma(n, set1(1.42860682030941723e-6f), r);  // ln2, low part
  F32 p = set1(0.0013814601115882397f);
  p = fma(p, r, set1(0.008368716575205326f));
  p = fma(p, r, set1(0.04166838899254799f));
  p = fma(p, r, set1(0.1666652113199234f));
  p = fma(p, r, set1(0.4999999403953552f));
  p = fma(p * r, r, r);
  return (p + set1(1.0f)) * exp2_int(n);
}

// log2(e), which exp2_product's callers fold into a constant factor.
inline constexpr float kLog2E = 1.44269504088896341f;

// 2^(a*b), at most 3 ulp plus what rounding a and b themselves did; for |a*b| < 2^22.
// a*b = n + r, |r| <= 1/2, where r comes out of one fma without rounding a*b; 2^r = 1 + r p(r), p of degree 4
// with relative error 9e-8, exactly 1 where a*b = 0. Two multiplications and a clamp less than exp.
inline F32 exp2_product(F32 a, F32 b) {
  const F32 shift = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer
  const F32 n = fma(a, b, shift) - shift;
  const F32 r = fms(a, b, n);
  F32 p = set1(0.001326472731307149f);
  p = fma(p, r, set1(0.009671512991189957f));
  p = fma(p, r, set1(0.05550733581185341f));
  p = fma(p, r, set1(0.24022242426872253f));
  p = fma(p, r, set1(0.6931470036506653f));
  p = fma(p, r, set1(1.0f));
  return scale_exp2(p, n);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(e) = 2 atanh(t), t = e / (2 + e) <= 1/3, so that
// a small result keeps its relative precision (at most 4 ulp).
inline F32 softplus(F32 x) {
  const F32 e = exp(set1(0.0f) - abs(x));
  const F32 t = e / (e + set1(2.0f));
  const F32 t2 = t * t;
  F32 p = set1(0.28191545605659485f);
  p = fma(p, t2, set1(0.2795766592025757f));
  p = fma(p, t2, set1(0.4002511501312256f));
  p = fma(p, t2, set1(0.6666631102561951f));
  p = fma(p, t2, set1(2.0f));
  return fma(p, t, max(x, set1(0.0f)));
}

// For |x| < 2^22; e^-x reaches 0 and infinity (or the ends of its range) where the result has long been
// 0 or 1 in float32.
inline F32 sigmoid(F32 x) { return set1(1.0f) / (set1(1.0f) + exp2_product(x, set1(-kLog2E))); }
inline F32 silu(F32 x) { return x / (set1(1.0f) + exp2_product(x, set1(-kLog2E))); }

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
