// The Vec vocabulary for AVX-512 (F, BW, DQ, VL, VNNI): sixteen lanes, tails by mask registers. The
// meaning of each name is stated in simd.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "mambaquant/dispatch.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

inline constexpr int64_t kLanes = 16;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};

inline F32 set1(float x) { return {_mm512_set1_ps(x)}; }
inline I32 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }

// First n lanes on; n in [0, 16].
inline __mmask16 lane_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
inline F32 widen(__m256i x, Float16) { return {_mm512_cvtph_ps(x)}; }
inline F32 widen(__m256i x, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
// T is Float16 or BFloat16.
template <typename T>
inline F32 load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <typename T>
inline F32 load(const T* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(lane_mask(n), p), T{});
}
inline F32 load(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw))};
}
inline F32 load(const int8_t* p, int64_t n) {
  const __m128i raw = _mm_maskz_loadu_epi8(lane_mask(n), p);
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw))};
}

inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, F32 x, int64_t n) { _mm512_mask_storeu_ps(p, lane_mask(n), x.v); }
inline __m256i narrow(F32 x, Float16) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i narrow(F32 x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(even, is_nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
template <typename T>
inline void store(T* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
template <typename T>
inline void store(T* p, F32 x, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), narrow(x, T{}));
}
inline void store(int8_t* p, F32 x) {
  const __m128i q = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), q);
}
inline void store(int8_t* p, F32 x, int64_t n) {
  _mm_mask_storeu_epi8(p, lane_mask(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline void store(int8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x.v));
}
inline void store(int8_t* p, I32 x, int64_t n) {
  _mm_mask_storeu_epi8(p, lane_mask(n), _mm512_cvtsepi32_epi8(x.v));
}
// The packs interleave 128-bit lanes (a0 b0 c0 d0 a1 ...): the permutation puts them in order.
inline void store4(int8_t* p, F32 a, F32 b, F32 c, F32 d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd)));
}
inline I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline I32 load_i32(const int32_t* p, int64_t n) {
  return {_mm512_maskz_loadu_epi32(lane_mask(n), p)};
}
inline void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
inline void store_i32(int32_t* p, I32 x, int64_t n) {
  _mm512_mask_storeu_epi32(p, lane_mask(n), x.v);
}

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
// The smaller magnitude with the sign of x.
inline F32 clamp_magnitude(F32 x, F32 limit) { return {_mm512_range_ps(x.v, limit.v, 2)}; }
// The maskz form, since GCC 12 warns (-Wuninitialized) inside its own _mm512_sqrt_ps.
inline F32 sqrt(F32 a) { return {_mm512_maskz_sqrt_ps(0xffff, a.v)}; }
inline F32 round_even(F32 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
inline F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }

struct Pairs {
  __m512i v;
};
// The sign that stands above b's bits is shifted out, a's is covered by b.
inline Pairs zip_pairs(__m128i a, __m128i b) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepi8_epi32(b), 16);
  return {_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_cvtepi8_epi32(a), high)};
}
inline Pairs load_pairs(const int8_t* a, const int8_t* b) {
  return zip_pairs(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
}
inline Pairs load_pairs(const int8_t* a, const int8_t* b, int64_t n) {
  const __mmask16 mask = lane_mask(n);
  return zip_pairs(_mm_maskz_loadu_epi8(mask, a), _mm_maskz_loadu_epi8(mask, b));
}
inline Pairs load_pairs(const int8_t* a) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)))};
}
inline Pairs load_pairs(const int8_t* a, int64_t n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lane_mask(n), a))};
}
inline Pairs set1_pairs(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return {_mm512_set1_epi32(pair)};
}
inline Pairs join_low_words(I32 a, I32 b) {
  const __m512i low_to_high = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
  const __mmask64 high = 0xccccccccccccccccu;
  return {_mm512_mask_shuffle_epi8(a.v, high, b.v, low_to_high)};
}
inline I32 dot(I32 acc, Pairs x, Pairs w) { return {_mm512_dpwssd_epi32(acc.v, x.v, w.v)}; }

inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
// First n lanes of a, the rest 0.
inline F32 keep_first(F32 a, int64_t n) { return {_mm512_maskz_mov_ps(lane_mask(n), a.v)}; }
// Four butterfly stages: out = swapped + (+-1) * a, minus where the lane's own bit is set.
inline F32 hadamard_lanes(F32 a) {
  const __m512 s1 = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  const __m512 s2 = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
  const __m512 s4 = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
  const __m512 s8 = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
  __m512 x = a.v;
  x = _mm512_fmadd_ps(x, s1, _mm512_permute_ps(x, 0xb1));
  x = _mm512_fmadd_ps(x, s2, _mm512_permute_ps(x, 0x4e));
  x = _mm512_fmadd_ps(x, s4, _mm512_shuffle_f32x4(x, x, 0xb1));
  x = _mm512_fmadd_ps(x, s8, _mm512_shuffle_f32x4(x, x, 0x4e));
  return {x};
}

struct Mask {
  __mmask16 v;
};
inline Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.v, b.v)}; }
inline Mask above(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask at_most(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask first_lanes(int64_t n) { return {lane_mask(n)}; }
// Compressed in the register: compressing into memory is much slower on some processors.
inline int64_t pack(float* p, F32 x, Mask mask) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(mask.v, x.v));
  return __builtin_popcount(mask.v);
}
inline int64_t pack(int32_t* p, I32 x, Mask mask) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask.v, x.v));
  return __builtin_popcount(mask.v);
}

inline F32 exp2_int(F32 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

// The permutation looks at the low five bits of an index, which count 32nds in t; scalef rounds n down.
inline constexpr int32_t kExp2Steps = 32;
inline F32 exp2_steps(F32 t, F32 n) {
  const __m512 low = _mm512_setr_ps(
      1.0f, 1.0218971486541166f, 1.0442737824274138f, 1.0671404006768237f, 1.0905077326652577f,
      1.1143867425958924f, 1.1387886347566916f, 1.1637248587775775f, 1.189207115002721f,
      1.215247359980469f, 1.2418578120734840f, 1.2690509571917332f, 1.2968395546510096f,
      1.3252366431597413f, 1.3542555469368927f, 1.383909881963832f);
  const __m512 high = _mm512_setr_ps(
      1.4142135623730951f, 1.4451808069770467f, 1.4768261459394993f, 1.5091644275934228f,
      1.5422108254079407f, 1.5759808451078865f, 1.6104903319492543f, 1.645755478153965f,
      1.681792830507429f, 1.7186192981224779f, 1.7562521603732995f, 1.7947090750031072f,
      1.8340080864093424f, 1.8741676341103f, 1.9152065613971474f, 1.9571441241754002f);
  const __m512i index = _mm512_castps_si512(t.v);
  return {_mm512_scalef_ps(_mm512_permutex2var_ps(low, index, high), n.v)};
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
