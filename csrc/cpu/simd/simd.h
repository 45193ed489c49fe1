// The vector vocabulary that all CPU kernels are written in. Each .cc file is compiled once per ISA with
// MBQ_ISA set to the ISA's namespace; the header chosen here gives the names below their meaning.
//
//   kLanes                       floats in an F32, int32s in an I32
//   load(T*), load(T*, n)        T in float, Float16, BFloat16, int8_t -> F32; n: first n lanes, rest 0
//   store(T*, x), store(T*, x, n)  int8_t: rounds ties to even, saturates to [-128, 127]; of I32 saturates
//   store4(int8_t*, a, b, c, d)  4 * kLanes values in order; rounds and saturates as store
//   load_i32, store_i32          int32 without conversion
//   + - * /  sqrt  abs           lane by lane, one rounding each
//   fma(a, b, c), fms, fnma      a*b + c, a*b - c, c - a*b; one rounding (two in the scalar ISA)
//   min(a, b), max(a, b)         b where either is NaN, on every ISA; of I32 too
//   clamp_magnitude(x, limit)    x within -limit and limit; one of them where x is NaN
//   round_even                   nearest integer, ties to even
//   to_f32(I32), to_i32(F32)     conversion, ties to even
//   bits_of(F32)                 the same bits as an I32
//   load_pairs(a, b)             Pairs, kLanes times two int16: a[i] and b[i] of two rows of int8
//   load_pairs(a)                a[i] and anything
//   load_pairs(a, b, n), load_pairs(a, n)  the first n lanes alone
//   set1_pairs(p)                p[0] and p[1] in every lane
//   join_low_words(a, b)         the low 16 bits of a[i] and of b[i]
//   dot(acc, x, w)               int32: acc + x[i].first * w[i].first + x[i].second * w[i].second
//   reduce_add, reduce_max       over lanes
//   keep_first(a, n)             first n lanes of a, the rest 0
//   hadamard_lanes               unnormalised Sylvester transform across the lanes of one vector
//   above(a, b), at_most(a, b)   Mask, the lanes where a > b, a <= b; first_lanes(n): the first n; & of two
//   pack(T*, x, mask)            T in float (F32), int32_t (I32): the lanes of the mask, in order, next to each
//                                other; returns how many, and may write kLanes
//   exp2_int(n)                  2^n for integer-valued n in [-126, 127]
//   exp2_steps(t, n)             2^n for n in steps of 1 / kExp2Steps, t = n + 1.5 * 2^23 / kExp2Steps; where
//                                n leaves [-126, 127], AVX-512 goes on to subnormals, 0 and inf and the
//                                others stay at the end of that range
//   load_up_to, store_up_to      the first n lanes, n in [1, kLanes]
//
// NOTE(odr): everything lives in an anonymous namespace inside the ISA's namespace, and no standard
// header with inline code is used, so that the linker can never pick an AVX-512 copy of a shared inline
// function for a machine that lacks it (scripts/check_symbols.py tests this).
#pragma once

#define MBQ_ISA_ID_scalar 0
#define MBQ_ISA_ID_avx2 1
#define MBQ_ISA_ID_avx512_vnni 2
#define MBQ_CONCAT_(a, b) a##b
#define MBQ_CONCAT(a, b) MBQ_CONCAT_(a, b)
#define MBQ_ISA_ID MBQ_CONCAT(MBQ_ISA_ID_, MBQ_ISA)

#if MBQ_ISA_ID == MBQ_ISA_ID_avx512_vnni
#include "cpu/simd/avx512_vnni.h"
#elif MBQ_ISA_ID == MBQ_ISA_ID_avx2
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/scalar.h"
#endif

// Of functions and lambdas that take accumulators by reference: a call would send them through memory.
#define MBQ_INLINE __attribute__((always_inline))

namespace mambaquant::cpu::MBQ_ISA {
namespace {

// Into L2; any address is allowed.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The first n lanes, without a mask where n is kLanes.
template <typename T>
inline F32 load_up_to(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load(p, n);
}
inline I32 load_i32_up_to(const int32_t* p, int64_t n) {
  return n == kLanes ? load_i32(p) : load_i32(p, n);
}
template <typename T, typename V>
inline void store_up_to(T* p, V x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store(p, x, n);
  }
}

// A number that is a type, to index arrays of accumulators by.
template <int64_t kIndex>
struct Index {
  constexpr operator int64_t() const { return kIndex; }
};

// f(Index<0>()), f(Index<1>()), ... written out. A loop that the compiler unrolls late, or not, keeps arrays
// of vectors in memory.
template <int64_t kCount, int64_t kBegin = 0, typename F>
MBQ_INLINE inline void unrolled(const F& f) {
  if constexpr (kBegin < kCount) {
    f(Index<kBegin>());
    unrolled<kCount, kBegin + 1>(f);
  }
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
