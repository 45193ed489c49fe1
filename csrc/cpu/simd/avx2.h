// The Vec vocabulary for AVX2 + FMA + F16C: eight lanes. The meaning of each name is stated in simd.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "mambaquant/dispatch.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

inline constexpr int64_t kLanes = 8;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};

inline F32 set1(float x) { return {_mm256_set1_ps(x)}; }
inline I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x)}; }

// First n lanes on.
inline __m256i lane_mask(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), lane);
}

inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F32 load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
inline F32 widen(__m128i x, Float16) { return {_mm256_cvtph_ps(x)}; }
inline F32 widen(__m128i x, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline F32 widen(__m128i x, int8_t) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x))}; }
// T is Float16, BFloat16 (16 bytes a vector) or int8_t (8 bytes).
template <typename T>
inline F32 load(const T* p) {
  const __m128i* raw = reinterpret_cast<const __m128i*>(p);
  return widen(sizeof(T) == 1 ? _mm_loadl_epi64(raw) : _mm_loadu_si128(raw), T{});
}
template <typename T>
inline F32 load(const T* p, int64_t n) {
  alignas(16) T buffer[16 / sizeof(T)] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(static_cast<const T*>(buffer));
}

inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
inline void store(float* p, F32 x, int64_t n) { _mm256_maskstore_ps(p, lane_mask(n), x.v); }
inline __m128i narrow(F32 x, Float16) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i narrow(F32 x, BFloat16) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, is_nan), 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline __m128i narrow(I32 x) {
  const __m128i q16 =
      _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  return _mm_packs_epi16(q16, q16);
}
inline __m128i narrow(F32 x, int8_t) { return narrow(I32{_mm256_cvtps_epi32(x.v)}); }
template <typename T>
inline void store(T* p, F32 x) {
  __m128i* raw = reinterpret_cast<__m128i*>(p);
  if (sizeof(T) == 1) {
    _mm_storel_epi64(raw, narrow(x, T{}));
  } else {
    _mm_storeu_si128(raw, narrow(x, T{}));
  }
}
template <typename T>
inline void store(T* p, F32 x, int64_t n) {
  alignas(16) T buffer[16 / sizeof(T)];
  store(static_cast<T*>(buffer), x);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}
inline void store(int8_t* p, I32 x) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow(x)); }
inline void store(int8_t* p, I32 x, int64_t n) {
  alignas(16) int8_t buffer[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow(x));
  std::memcpy(p, buffer, static_cast<size_t>(n));
}
// The packs interleave 128-bit lanes (a0 b0 c0 d0 a1 ...): the permutation puts them in order.
inline void store4(int8_t* p, F32 a, F32 b, F32 c, F32 d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
inline I32 load_i32(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline I32 load_i32(const int32_t* p, int64_t n) {
  return {_mm256_maskload_epi32(p, lane_mask(n))};
}
inline void store_i32(int32_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v);
}
inline void store_i32(int32_t* p, I32 x, int64_t n) {
  _mm256_maskstore_epi32(p, lane_mask(n), x.v);
}

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32 clamp_magnitude(F32 x, F32 limit) {
  return {
      _mm256_max_ps(_mm256_min_ps(x.v, limit.v), _mm256_xor_ps(limit.v, _mm256_set1_ps(-0.0f)))};
}
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32 round_even(F32 a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I32 min(I32 a, I32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline I32 bits_of(F32 a) { return {_mm256_castps_si256(a.v)}; }
inline F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }

struct Pairs {
  __m256i v;
};
inline __m128i load_bytes(const int8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
inline __m128i load_bytes(const int8_t* p, int64_t n) {
  alignas(8) int8_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n));
  return load_bytes(buffer);
}
// The sign that stands above b's bits is shifted out, a's is covered by b.
inline Pairs zip_pairs(__m128i a, __m128i b) {
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepi8_epi32(b), 16);
  return {_mm256_blend_epi16(_mm256_cvtepi8_epi32(a), high, 0xaa)};
}
inline Pairs load_pairs(const int8_t* a, const int8_t* b) {
  return zip_pairs(load_bytes(a), load_bytes(b));
}
inline Pairs load_pairs(const int8_t* a, const int8_t* b, int64_t n) {
  return zip_pairs(load_bytes(a, n), load_bytes(b, n));
}
inline Pairs load_pairs(const int8_t* a) { return {_mm256_cvtepi8_epi32(load_bytes(a))}; }
inline Pairs load_pairs(const int8_t* a, int64_t n) {
  return {_mm256_cvtepi8_epi32(load_bytes(a, n))};
}
inline Pairs set1_pairs(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return {_mm256_set1_epi32(pair)};
}
inline Pairs join_low_words(I32 a, I32 b) {
  return {_mm256_blend_epi16(a.v, _mm256_slli_epi32(b.v, 16), 0xaa)};
}
inline I32 dot(I32 acc, Pairs x, Pairs w) {
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(x.v, w.v))};
}

inline float reduce_add(F32 a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(F32 a) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
// First n lanes of a, the rest 0.
inline F32 keep_first(F32 a, int64_t n) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(lane_mask(n)))};
}
// Three butterfly stages: out = swapped + (+-1) * a, minus where the lane's own bit is set.
inline F32 hadamard_lanes(F32 a) {
  const __m256 s1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
  const __m256 s2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
  const __m256 s4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
  __m256 x = a.v;
  x = _mm256_fmadd_ps(x, s1, _mm256_permute_ps(x, 0xb1));
  x = _mm256_fmadd_ps(x, s2, _mm256_permute_ps(x, 0x4e));
  x = _mm256_fmadd_ps(x, s4, _mm256_permute2f128_ps(x, x, 0x01));
  return {x};
}

struct Mask {
  uint32_t v;
};
inline Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
inline Mask mask_of(__m256 lanes) { return {static_cast<uint32_t>(_mm256_movemask_ps(lanes))}; }
inline Mask above(F32 a, F32 b) { return mask_of(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)); }
inline Mask at_most(F32 a, F32 b) { return mask_of(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)); }
inline Mask first_lanes(int64_t n) { return {(1u << n) - 1u}; }
template <typename T>
inline int64_t pack_lanes(T* p, const T* lanes, uint32_t mask) {
  int64_t count = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    p[count] = lanes[lane];
    count += (mask >> lane) & 1u;
  }
  return count;
}
inline int64_t pack(float* p, F32 x, Mask mask) {
  alignas(32) float lanes[kLanes];
  store(lanes, x);
  return mask.v == 0 ? 0 : pack_lanes(p, lanes, mask.v);
}
inline int64_t pack(int32_t* p, I32 x, Mask mask) {
  alignas(32) int32_t lanes[kLanes];
  store_i32(lanes, x);
  return mask.v == 0 ? 0 : pack_lanes(p, lanes, mask.v);
}

inline F32 exp2_int(F32 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}

// The bits of t count eighths. Shifted by 20 they count in the units of a float's exponent and of the three
// bits below, where the table makes 2^(i/8) out of the count i.
inline constexpr int32_t kExp2Steps = 8;
inline F32 exp2_steps(F32 t, F32) {
  const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                          0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const __m256i lowest = _mm256_set1_epi32(0x49c00000 - 8 * 126);
  const __m256i highest = _mm256_set1_epi32(0x49c00000 + 8 * 127 + 7);
  const __m256i steps =
      _mm256_min_epi32(_mm256_max_epi32(_mm256_castps_si256(t.v), lowest), highest);
  const __m256i start = _mm256_permutevar8x32_epi32(table, steps);
  return {_mm256_castsi256_ps(_mm256_add_epi32(start, _mm256_slli_epi32(steps, 20)))};
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
