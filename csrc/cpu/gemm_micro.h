// The part of the matrix product that each ISA writes for itself: the sums of one tile of kTileRows x
// kTileColumns results, and the layouts that its inner loop reads in a straight line. Names defined here:
//
//   kTileRows, kTileColumns    most rows and most columns of a tile; kTileVectors vectors of columns
//   kNarrowVectors             vectors of columns that a tile at the right edge has where they suffice
//   prepare_rows(source, scratch, start)    activations as the inner loop reads them: int8 where
//                              they lie, or an int16 copy in scratch; and what the sums of each row start at
//   depth_group(padded_k)      values of k that stand side by side in packed weights, G below
//   kWeightBias                added to each packed weight
//   kPackingVersion            raised with every change of what pack_gemm_weight writes, see below
//   kStepBytes                 of a panel that one step of the inner loop reads
//   accumulate<kRows, kVectors>(rows, weights, sum)   sum[r][v] += the products of the tile
//
// Packed weights: index(n, k) = (n/C)*C*padded_k + (k/G)*C*G + (n%C)*G + k%G with C = kTileColumns.
//
// Files hold weights in this order (docs/design/0014-packed-images.md), and name its version: a file
// of another one is not read. tests/ops/test_gemm.py knows the bytes of each version.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/simd.h"
#include "mambaquant/gemm.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

// Activations as they lie in memory.
struct SourceRows {
  const int8_t* a;
  int64_t stride;
  int64_t rows;
  int64_t k;
};

#if MBQ_ISA_ID == MBQ_ISA_ID_avx512_vnni
using RowT = int8_t;
#else
using RowT = int16_t;
#endif

// Activations as the inner loop reads them: whole turns of it, and at least one.
struct Rows {
  const RowT* a;
  int64_t stride;
  int64_t k;

  Rows from(int64_t row) const { return {a + row * stride, stride, k}; }
};

// Weights that one tile reads. Each step of the inner loop fetches the kStepBytes at `ahead` into L1, too,
// and goes on by ahead_step bytes; any address is allowed there.
struct Weights {
  const int8_t* panel;
  const int8_t* ahead;
  int64_t ahead_step;
};

// Pointers to the rows of a tile: every third one, since an address may be a base plus one or two
// strides. So twelve rows take four registers and the stride.
template <int64_t kRows>
struct RowPointers {
  static constexpr int64_t kBases = (kRows + 2) / 3;

  MBQ_INLINE explicit RowPointers(const Rows& rows) : stride(rows.stride) {
    base[0] = rows.a;
    unrolled<kBases - 1>([&](auto b) MBQ_INLINE { base[b + 1] = base[b] + 3 * stride; });
  }
  MBQ_INLINE const RowT* row(int64_t r) const { return base[r / 3] + r % 3 * stride; }
  MBQ_INLINE void advance(int64_t n) {
    unrolled<kBases>([&](auto b) MBQ_INLINE { base[b] += n; });
  }

  const RowT* base[kBases];
  int64_t stride;
};

// Four bytes as they lie, for a broadcast.
inline int32_t load_four_bytes(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof(four));
  return four;
}

#if MBQ_ISA_ID == MBQ_ISA_ID_avx512_vnni

// NOTE(vnni-compensation): vpdpbusd multiplies unsigned by signed bytes. The weights take the
// unsigned side, stored as w + 128, so that activations are used as they come:
//   sum_k (w + 128) * a = sum_k w * a + 128 * sum_k a
// and each row's sums start at -128 * sum_k a. Sums wrap modulo 2^32, so that the result is exact even
// where the biased sum leaves int32; vpdpbusds, which saturates, would break this.
//
// Tile: 12 rows x 2 vectors = 24 accumulators, 2 weights, 1 broadcast. A step of four k is 24
// vpdpbusd (12 cycles on two ports) against 2 weight loads, 2 fetches ahead and 12 broadcast loads.
inline constexpr int64_t kTileRows = 12;
inline constexpr int64_t kTileVectors = 2, kNarrowVectors = 1;
inline constexpr int64_t kTileColumns = kTileVectors * 16;
inline constexpr int64_t kGroup = 4;
inline constexpr int64_t kStepBytes = kTileColumns * kGroup;
// A turn of the inner loop is two groups. Where k ends with the first of them, the second multiplies rows'
// zeros with whatever follows in the packed weights, which end later: kGemmDepthMultiple.
inline constexpr int64_t kTurnDepth = 2 * kGroup;
static_assert(kGemmDepthMultiple % kTurnDepth == 0 && kGemmCpuDepthMultiple == kGroup);
inline constexpr int32_t kWeightBias = 128;
inline constexpr int64_t kPackingVersion = 1;

inline int64_t depth_group(int64_t) { return kGroup; }

// The sums of four rows over all k, to the starts of their products.
inline __m128i start_four_rows(const int8_t* a, int64_t stride, int64_t k) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[4];
  for (int64_t r = 0; r < 4; ++r) sum[r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 64) {
    const __mmask64 mask = k - i < 64 ? (uint64_t{1} << (k - i)) - 1 : ~uint64_t{0};
    for (int64_t r = 0; r < 4; ++r) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(mask, a + r * stride + i);
      sum[r] = _mm512_dpbusd_epi32(sum[r], ones, bytes);
    }
  }
  // Lane by lane of 128 bits, a transpose whose rows are added; then the lanes.
  const __m512i pair01 = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[0], sum[1]),
                                          _mm512_unpackhi_epi32(sum[0], sum[1]));
  const __m512i pair23 = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[2], sum[3]),
                                          _mm512_unpackhi_epi32(sum[2], sum[3]));
  const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(pair01, pair23),
                                        _mm512_unpackhi_epi64(pair01, pair23));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
  const __m128i total =
      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), total), 7);
}

// The last four rows may overlap the four before; of less than four, each stands for all.
inline void start_rows(const SourceRows& source, int32_t* start) {
  if (source.rows < 4) {
    for (int64_t r = 0; r < source.rows; ++r) {
      const __m128i four = start_four_rows(source.a + r * source.stride, 0, source.k);
      start[r] = _mm_cvtsi128_si32(four);
    }
    return;
  }
  for (int64_t r = 0; r < source.rows; r += 4) {
    const int64_t first = r + 4 <= source.rows ? r : source.rows - 4;
    const __m128i four = start_four_rows(source.a + first * source.stride, source.stride, source.k);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(start + first), four);
  }
}

inline Rows prepare_rows(const SourceRows& source, int8_t* scratch, int32_t* start) {
  start_rows(source, start);
  const int64_t padded_k = round_up(source.k, kTurnDepth);
  if (source.k == padded_k) return {source.a, source.stride, padded_k};
  for (int64_t r = 0; r < source.rows; ++r) {
    int8_t* const row = scratch + r * padded_k;
    std::memcpy(row, source.a + r * source.stride, static_cast<size_t>(source.k));
    std::memset(row + source.k, 0, static_cast<size_t>(padded_k - source.k));
  }
  return {scratch, padded_k, padded_k};
}

// Four k of every row, which four_of(r) gives, against the weight vectors.
template <int64_t kRows, int64_t kVectors, typename FourOf>
MBQ_INLINE inline void multiply_group(const FourOf& four_of, const int8_t* panel,
                                      I32 (&sum)[kRows][kVectors]) {
  __m512i w[kVectors];
  unrolled<kVectors>([&](auto v) MBQ_INLINE { w[v] = _mm512_loadu_si512(panel + 64 * v); });
  unrolled<kRows>([&](auto r) MBQ_INLINE {
    const __m512i x = _mm512_set1_epi32(four_of(r));
    unrolled<kVectors>([&](auto v)
                           MBQ_INLINE { sum[r][v].v = _mm512_dpbusd_epi32(sum[r][v].v, w[v], x); });
  });
}

template <int64_t kRows, int64_t kVectors>
MBQ_INLINE inline void accumulate(const Rows& rows, const Weights& weights,
                                  I32 (&sum)[kRows][kVectors]) {
  RowPointers<kRows> a(rows);
  const int8_t *panel = weights.panel, *ahead = weights.ahead;
  int64_t turns = rows.k / kTurnDepth;
  do {
    unrolled<kTurnDepth / kGroup>([&](auto g) MBQ_INLINE {
      _mm_prefetch(ahead, _MM_HINT_T0);
      _mm_prefetch(ahead + 64, _MM_HINT_T0);
      ahead += weights.ahead_step;
      const auto four_of = [&](int64_t r)
                               MBQ_INLINE { return load_four_bytes(a.row(r) + g * kGroup); };
      multiply_group(four_of, panel, sum);
      panel += kStepBytes;
    });
    a.advance(kTurnDepth);
  } while (--turns > 0);
}

#else  // AVX2 and scalar: activations widened to int16 once, G = 2 for AVX2 and all of k for scalar

inline constexpr int32_t kWeightBias = 0;

int64_t depth_group(int64_t padded_k);

inline Rows prepare_rows(const SourceRows& source, int8_t* scratch, int32_t* start) {
  const int64_t padded_k = round_up(source.k, kGemmCpuDepthMultiple);
  int16_t* const copy = reinterpret_cast<int16_t*>(scratch);
  for (int64_t r = 0; r < source.rows; ++r) {
    const int8_t* from = source.a + r * source.stride;
    int16_t* to = copy + r * padded_k;
    for (int64_t i = 0; i < source.k; ++i) to[i] = from[i];
    for (int64_t i = source.k; i < padded_k; ++i) to[i] = 0;
    start[r] = 0;
  }
  return {copy, padded_k, padded_k};
}

#if MBQ_ISA_ID == MBQ_ISA_ID_avx2

// vpmaddwd on widened bytes: exact, where vpmaddubsw would saturate at int16. Per 32 products it takes
// two vpmaddwd and two vpaddd. vpmaddubsw of |a| and of w with the sign of a does not saturate either
// (2 * 128 * 127 < 2^15), but its sums must be widened at once: vpsignb, vpmaddubsw, vpmaddwd and vpaddd,
// three of them for the ports that multiply. Nibbles of a + 128 take two vpmaddubsw and two vpaddw, and
// more to widen every eighth time. Neither is less.
//
// Tile: 6 rows x 2 vectors = 12 accumulators, 2 weights, 1 broadcast. A step of two k is 2 widening loads,
// 6 broadcasts, 12 vpmaddwd, 12 vpaddd: 26 on four vector ports, 6.5 cycles for 384 operations.
inline constexpr int64_t kTileRows = 6;
inline constexpr int64_t kTileVectors = 2, kNarrowVectors = 1;
inline constexpr int64_t kTileColumns = kTileVectors * 8;
inline constexpr int64_t kGroup = 2;
inline constexpr int64_t kStepBytes = kTileColumns * kGroup;
inline constexpr int64_t kPackingVersion = 1;

inline int64_t depth_group(int64_t) { return kGroup; }

// Two k of every row against the weight vectors.
template <int64_t kRows, int64_t kVectors>
MBQ_INLINE inline void multiply_group(const RowPointers<kRows>& a, const int8_t* panel,
                                      I32 (&sum)[kRows][kVectors]) {
  __m256i w[kVectors];
  unrolled<kVectors>([&](auto v) MBQ_INLINE {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(panel + 16 * v);
    w[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
  });
  unrolled<kRows>([&](auto r) MBQ_INLINE {
    const __m256i x = _mm256_set1_epi32(load_four_bytes(a.row(r)));
    unrolled<kVectors>([&](auto v) MBQ_INLINE {
      sum[r][v].v = _mm256_add_epi32(sum[r][v].v, _mm256_madd_epi16(w[v], x));
    });
  });
}

template <int64_t kRows, int64_t kVectors>
MBQ_INLINE inline void accumulate(const Rows& rows, const Weights& weights,
                                  I32 (&sum)[kRows][kVectors]) {
  RowPointers<kRows> a(rows);
  const int8_t *panel = weights.panel, *ahead = weights.ahead;
  int64_t turns = rows.k / kGroup;
  do {
    _mm_prefetch(ahead, _MM_HINT_T0);
    ahead += weights.ahead_step;
    multiply_group(a, panel, sum);
    panel += kStepBytes;
    a.advance(kGroup);
  } while (--turns > 0);
}

#else

// Plain rows and columns: four dot products over k at a time, which the compiler turns into SSE2 or
// NEON.
inline constexpr int64_t kTileRows = 4;
inline constexpr int64_t kTileVectors = 4, kNarrowVectors = 4;
inline constexpr int64_t kTileColumns = 4;
inline constexpr int64_t kStepBytes = 64;  // nothing is fetched ahead
inline constexpr int64_t kPackingVersion = 1;

inline int64_t depth_group(int64_t padded_k) { return padded_k > 0 ? padded_k : 1; }

template <int64_t kRows, int64_t kVectors>
MBQ_INLINE inline void accumulate(const Rows& rows, const Weights& weights,
                                  I32 (&sum)[kRows][kVectors]) {
  const int8_t* w0 = weights.panel;
  const int8_t* w1 = w0 + rows.k;
  const int8_t* w2 = w1 + rows.k;
  const int8_t* w3 = w2 + rows.k;
  for (int64_t r = 0; r < kRows; ++r) {
    const int16_t* a = rows.a + r * rows.stride;
    int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    for (int64_t i = 0; i < rows.k; ++i) {
      sum0 += a[i] * int16_t{w0[i]};
      sum1 += a[i] * int16_t{w1[i]};
      sum2 += a[i] * int16_t{w2[i]};
      sum3 += a[i] * int16_t{w3[i]};
    }
    sum[r][0] = sum[r][0] + I32{sum0};
    sum[r][1] = sum[r][1] + I32{sum1};
    sum[r][2] = sum[r][2] + I32{sum2};
    sum[r][3] = sum[r][3] + I32{sum3};
  }
}

#endif
#endif

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
