// The Vec vocabulary in portable C++: one lane. The meaning of each name is stated in simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "mambaquant/dispatch.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

inline constexpr int64_t kLanes = 1;

struct F32 {
  float v;
};
struct I32 {
  int32_t v;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// IEEE binary16 to binary32, subnormals included.
inline float to_float(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x0400u) {
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    return sign != 0 ? -value : value;
  }
  return float_of(sign | ((magnitude << 13) + 0x38000000u));
}
inline float to_float(BFloat16 b) { return float_of(static_cast<uint32_t>(b.bits) << 16); }
inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }

// binary32 to binary16, ties to even, NaN kept quiet.
inline void from_float(float x, Float16* out) {
  const uint32_t bits = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}
inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(is_nan ? ((bits >> 16) | 0x40u) : rounded);
}
inline void from_float(float x, float* out) { *out = x; }
// Adding and taking away 1.5 * 2^23 leaves the nearest integer, ties to even, for |x| < 2^22; larger
// values are integers or far outside every range that is rounded here.
inline float round_to_even(float x) {
  if (!(float_of(bits_of(x) & 0x7fffffffu) < 4194304.0f)) return x;
  const volatile float shifted = x + 12582912.0f;
  return shifted - 12582912.0f;
}
inline void from_float(float x, int8_t* out) {
  const float limited = x < -128.0f ? -128.0f : (x > 127.0f ? 127.0f : x);
  *out = static_cast<int8_t>(round_to_even(limited));
}

inline F32 set1(float x) { return {x}; }
inline I32 set1_i32(int32_t x) { return {x}; }

template <typename T>
inline F32 load(const T* p) {
  return {to_float(*p)};
}
template <typename T>
inline F32 load(const T* p, int64_t n) {
  return {n > 0 ? to_float(*p) : 0.0f};
}
template <typename T>
inline void store(T* p, F32 x) {
  from_float(x.v, p);
}
template <typename T>
inline void store(T* p, F32 x, int64_t n) {
  if (n > 0) from_float(x.v, p);
}
inline void store(int8_t* p, I32 x) {
  *p = static_cast<int8_t>(x.v < -128 ? -128 : (x.v > 127 ? 127 : x.v));
}
inline void store(int8_t* p, I32 x, int64_t n) {
  if (n > 0) store(p, x);
}
inline void store4(int8_t* p, F32 a, F32 b, F32 c, F32 d) {
  store(p, a);
  store(p + 1, b);
  store(p + 2, c);
  store(p + 3, d);
}
inline I32 load_i32(const int32_t* p) { return {*p}; }
inline I32 load_i32(const int32_t* p, int64_t n) { return {n > 0 ? *p : 0}; }
inline void store_i32(int32_t* p, I32 x) { *p = x.v; }
inline void store_i32(int32_t* p, I32 x, int64_t n) {
  if (n > 0) *p = x.v;
}

inline F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
inline F32 fms(F32 a, F32 b, F32 c) { return {a.v * b.v - c.v}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {c.v - a.v * b.v}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 abs(F32 a) { return {float_of(bits_of(a.v) & 0x7fffffffu)}; }
inline F32 clamp_magnitude(F32 x, F32 limit) { return max(min(x, limit), {-limit.v}); }
inline F32 sqrt(F32 a) { return {std::sqrt(a.v)}; }
inline F32 round_even(F32 a) { return {round_to_even(a.v)}; }

inline I32 operator+(I32 a, I32 b) { return {a.v + b.v}; }
inline I32 operator-(I32 a, I32 b) { return {a.v - b.v}; }
inline I32 min(I32 a, I32 b) { return {a.v < b.v ? a.v : b.v}; }
inline I32 max(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }
inline I32 bits_of(F32 a) { return {static_cast<int32_t>(bits_of(a.v))}; }
inline F32 to_f32(I32 a) { return {static_cast<float>(a.v)}; }
inline I32 to_i32(F32 a) { return {static_cast<int32_t>(round_even(a).v)}; }

struct Pairs {
  int32_t first, second;
};
inline Pairs load_pairs(const int8_t* a, const int8_t* b) { return {*a, *b}; }
inline Pairs load_pairs(const int8_t* a, const int8_t* b, int64_t) { return {*a, *b}; }
inline Pairs load_pairs(const int8_t* a) { return {*a, 0}; }
inline Pairs load_pairs(const int8_t* a, int64_t) { return {*a, 0}; }
inline Pairs set1_pairs(const int16_t* p) { return {p[0], p[1]}; }
inline Pairs join_low_words(I32 a, I32 b) {
  return {static_cast<int16_t>(a.v), static_cast<int16_t>(b.v)};
}
inline I32 dot(I32 acc, Pairs x, Pairs w) {
  return {acc.v + x.first * w.first + x.second * w.second};
}

inline float reduce_add(F32 a) { return a.v; }
inline float reduce_max(F32 a) { return a.v; }
inline F32 keep_first(F32 a, int64_t n) { return {n > 0 ? a.v : 0.0f}; }
inline F32 hadamard_lanes(F32 a) { return a; }

struct Mask {
  bool v;
};
inline Mask operator&(Mask a, Mask b) { return {a.v && b.v}; }
inline Mask above(F32 a, F32 b) { return {a.v > b.v}; }
inline Mask at_most(F32 a, F32 b) { return {a.v <= b.v}; }
inline Mask first_lanes(int64_t n) { return {n > 0}; }
inline int64_t pack(float* p, F32 x, Mask mask) {
  *p = x.v;
  return mask.v;
}
inline int64_t pack(int32_t* p, I32 x, Mask mask) {
  *p = x.v;
  return mask.v;
}

// 2^n for an integer-valued n in [-126, 127].
inline F32 exp2_int(F32 n) {
  return {float_of(static_cast<uint32_t>(static_cast<int32_t>(n.v) + 127) << 23)};
}

// As in avx2.h.
inline constexpr int32_t kExp2Steps = 8;
inline F32 exp2_steps(F32 t, F32) {
  constexpr uint32_t kTable[kExp2Steps] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                           0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  constexpr int32_t kLowest = 0x49c00000 - 8 * 126, kHighest = 0x49c00000 + 8 * 127 + 7;
  int32_t steps = static_cast<int32_t>(bits_of(t.v));
  steps = steps < kLowest ? kLowest : steps > kHighest ? kHighest : steps;
  return {float_of(kTable[steps & 7] + (static_cast<uint32_t>(steps) << 20))};
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
