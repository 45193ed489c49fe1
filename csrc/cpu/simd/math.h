// exp2, softplus and SiLU over vectors. Polynomials are minimax fits (Remez exchange in 50 digits).
#pragma once

#include "cpu/simd/simd.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

inline constexpr float kLog2E = 1.44269504088896341f;

// 2^x as a power of two times a step of a table, and the factor beside 1 that is left. Callers multiply
// in the order that suits them.
struct Exp2 {
  F32 steps, rest;

  F32 value() const { return steps * rest; }
};

// Adding it leaves the nearest multiple of 1 / kExp2Steps, the count of which is in the sum's last bits.
inline constexpr float kExp2Shift = 12582912.0f / static_cast<float>(kExp2Steps);  // 1.5 * 2^23

// 2^(a*b), at most 3 ulp plus what rounding a and b themselves did (in the scalar ISA, whose fma rounds
// twice, the product too); for |a*b| < 2^22. Exactly 1 where a*b = 0.
// a*b = n + r, where r, of magnitude 1 / (2 kExp2Steps) at most, comes out of one fma without rounding
// a*b; 2^r = 1 + r q(r) with relative error 5.3e-8 (32 steps) or 2.6e-8 (8).
inline Exp2 exp2_product(F32 a, F32 b) {
  const F32 t = fma(a, b, set1(kExp2Shift));
  const F32 n = t - set1(kExp2Shift);
  const F32 r = fms(a, b, n);
  F32 q;
  if constexpr (kExp2Steps == 32) {
    q = fma(set1(0.24022886157035828f), r, set1(0.6931573152542114f));
  } else {
    q = fma(set1(0.055511474609375f), r, set1(0.2402576357126236f));
    q = fma(q, r, set1(0.6931471824645996f));
  }
  return {exp2_steps(t, n), fma(q, r, set1(1.0f))};
}

// e^x, at most 2 ulp, for x in (-87, 0]; below, the result ends at 0 or 1.2e-38. x = n ln2 + r, with ln2 in
// two parts, of which n times the first is exact; e^r = 1 + r q(r) with relative error 2.6e-8.
inline F32 exp(F32 x) {
  const F32 t = fma(x, set1(kLog2E), set1(kExp2Shift));
  const F32 n = t - set1(kExp2Shift);
  const F32 r = fnma(n, set1(-2.1219444170128554e-4f), fnma(n, set1(0.693359375f), x));
  F32 q = fma(set1(0.16668878495693207f), r, set1(0.5000647902488708f));
  q = fma(q, r, set1(1.0f));
  return exp2_steps(t, n) * fma(q, r, set1(1.0f));
}

// log(1 + e^x) = max(x, 0) + log1p(e) with e = e^-|x|, so that a small result keeps its relative
// precision (at most 4 ulp). log1p(e) = e (1 + e p(e)) with relative error 5.7e-8: a division would not
// take less time than the polynomial on processors where it is fast, and three times that elsewhere.
inline F32 softplus(F32 x) {
  const F32 e = exp(set1(0.0f) - abs(x));
  F32 p = set1(0.005364829674363136f);
  p = fma(p, e, set1(-0.030065814033150673f));
  p = fma(p, e, set1(0.07920456677675247f));
  p = fma(p, e, set1(-0.13753804564476013f));
  p = fma(p, e, set1(0.1915365606546402f));
  p = fma(p, e, set1(-0.24857163429260254f));
  p = fma(p, e, set1(0.3332132399082184f));
  p = fma(p, e, set1(-0.49999648332595825f));
  p = fma(p, e, set1(1.0f));
  return fma(p, e, max(x, set1(0.0f)));
}

// 1 + 2^(a*b) for |a*b| < 2^22: with x and -log2(e), what divides by a logistic function of x.
inline F32 one_plus_exp2(F32 a, F32 b) {
  const Exp2 e = exp2_product(a, b);
  return fma(e.steps, e.rest, set1(1.0f));
}
inline F32 silu(F32 x) { return x / one_plus_exp2(x, set1(-kLog2E)); }

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
