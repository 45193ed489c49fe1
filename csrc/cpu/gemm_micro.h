// The part of the matrix product that each ISA writes for itself: one tile of kTileRows x
// kTileColumns accumulators, and the layouts that its inner loop reads in a straight line. Names
// defined here:
//
//   kTileRows, kTileColumns    most rows and exactly how many columns a tile has
//   RowT                       element of the repacked activations
//   depth_group(padded_k)      values of k that stand side by side in both layouts, G below
//   kWeightBias                added to each packed weight
//   kPackingVersion            raised with every change of what pack_gemm_weight writes, see below
//   pack_row_tile(...)         activations: packed[k/G][row][k%G]; and the accumulators' start, one
//   per row tile_product<kRows, kVectors>(...)   acc[row][column], kTileColumns a row; kVectors of
//   kTileVectors computed
//
// Packed weights: index(n, k) = (n/C)*C*padded_k + (k/G)*C*G + (n%C)*G + k%G with C = kTileColumns.
//
// Files hold weights in this order (docs/design/0014-packed-images.md), and name its version: a file
// of another one is not read. tests/ops/test_gemm.py knows the bytes of each version.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/simd.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

// A few rows of the activations, as they lie in memory.
struct RowTile {
  const int8_t* a;
  int64_t stride;
  int64_t rows;
  int64_t k;
};

#if MBQ_ISA_ID == MBQ_ISA_ID_avx512_vnni

// NOTE(vnni-compensation): vpdpbusd multiplies unsigned by signed bytes. The weights take the
// unsigned side, stored as w + 128, so that activations are used as they come:
//   sum_k (w + 128) * a = sum_k w * a + 128 * sum_k a
// and each row's accumulators start at -128 * sum_k a. Sums wrap modulo 2^32, so that the result is
// exact even where the biased sum leaves int32; vpdpbusds, which saturates, would break this.
//
// Tile: 12 rows x 2 vectors = 24 accumulators, 2 weights, 1 broadcast. A step of four k is 24
// vpdpbusd (12 cycles on two ports) against 2 weight loads and 12 broadcast loads; 6 x 4 has fewer
// loads (10) but reads twice the weight bytes, which come from L2 once a panel outgrows L1.
inline constexpr int64_t kTileRows = 12;
inline constexpr int64_t kTileVectors = 2;
inline constexpr int64_t kTileColumns = kTileVectors * 16;
inline constexpr int64_t kGroup = 4;
// The panel is fetched into L1 this far ahead, 16 steps: without it K = 4096 runs a fifth slower.
inline constexpr int64_t kPrefetchBytes = 2048;
inline constexpr int32_t kWeightBias = 128;
inline constexpr int64_t kPackingVersion = 1;
using RowT = int8_t;

inline int64_t depth_group(int64_t) { return kGroup; }

inline int32_t row_sum(const int8_t* row, int64_t k) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(row + i));
  const __mmask64 mask = (uint64_t{1} << (k - i)) - 1;
  sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(mask, row + i));
  return _mm512_reduce_add_epi32(sum);
}

// One row's k values from `begin` on, one group of four at a time; a last group that is cut short
// is filled with 0.
inline void pack_row(const RowTile& tile, int64_t row, int64_t begin, int8_t* packed) {
  const int8_t* source = tile.a + row * tile.stride;
  int8_t* target = packed + row * kGroup;
  int64_t i = begin;
  for (; i + kGroup <= tile.k; i += kGroup) std::memcpy(target + i * tile.rows, source + i, kGroup);
  if (i == tile.k) return;
  int8_t last[kGroup] = {};
  for (int64_t j = 0; i + j < tile.k; ++j) last[j] = source[i + j];
  std::memcpy(target + i * tile.rows, last, kGroup);
}

// Four rows by sixteen k: a 4 x 4 transpose of groups.
inline void pack_four_rows(const int8_t* a, int64_t stride, int64_t packed_stride, int8_t* packed) {
  const auto load_row = [&](int64_t row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + row * stride));
  };
  const __m128i r0 = load_row(0), r1 = load_row(1), r2 = load_row(2), r3 = load_row(3);
  const __m128i low01 = _mm_unpacklo_epi32(r0, r1), low23 = _mm_unpacklo_epi32(r2, r3);
  const __m128i high01 = _mm_unpackhi_epi32(r0, r1), high23 = _mm_unpackhi_epi32(r2, r3);
  const auto store_group = [&](int64_t group, __m128i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + group * packed_stride), x);
  };
  store_group(0, _mm_unpacklo_epi64(low01, low23));
  store_group(1, _mm_unpackhi_epi64(low01, low23));
  store_group(2, _mm_unpacklo_epi64(high01, high23));
  store_group(3, _mm_unpackhi_epi64(high01, high23));
}

inline void pack_row_tile(const RowTile& tile, int8_t* packed, int32_t* start) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint32_t sum = static_cast<uint32_t>(row_sum(tile.a + r * tile.stride, tile.k));
    start[r] = static_cast<int32_t>(0u - 128u * sum);
  }
  // The last four rows may overlap the four before: they are written twice, alike.
  const int64_t blocked_k = tile.rows >= 4 ? tile.k / 16 * 16 : 0;
  for (int64_t r = 0; blocked_k > 0 && r < tile.rows; r += 4) {
    const int64_t first = r + 4 <= tile.rows ? r : tile.rows - 4;
    for (int64_t i = 0; i < blocked_k; i += 16) {
      pack_four_rows(tile.a + first * tile.stride + i, tile.stride, tile.rows * kGroup,
                     packed + i * tile.rows + first * kGroup);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) pack_row(tile, r, blocked_k, packed);
}

// Four k of every row against both weight vectors.
template <int64_t kRows, int64_t kVectors>
inline void multiply_group(const int8_t* a, const int8_t* panel, __m512i (&sum)[kRows][kVectors]) {
  __m512i w[kVectors];
#pragma GCC unroll 4
  for (int64_t v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_si512(panel + 64 * v);
  _mm_prefetch(panel + kPrefetchBytes, _MM_HINT_T0);
  _mm_prefetch(panel + kPrefetchBytes + 64, _MM_HINT_T0);
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
    int32_t four;
    std::memcpy(&four, a + r * kGroup, sizeof(four));
    const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], w[v], x);
  }
}

template <int64_t kRows, int64_t kVectors>
void tile_product(const int8_t* a, const int32_t* start, const int8_t* panel, int64_t padded_k,
                  int32_t* acc) {
  // vpdpbusd takes 5 cycles and two start per cycle: few rows need several sums each to fill them.
  constexpr int64_t kChains = kRows * kVectors;
  constexpr int64_t kSums = kChains <= 2 ? 4 : kChains <= 6 ? 2 : 1;
  constexpr int64_t kPanelStep = kTileColumns * kGroup, kRowStep = kRows * kGroup;
  __m512i sum[kSums][kRows][kVectors];
#pragma GCC unroll 4
  for (int64_t s = 0; s < kSums; ++s) {
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v)
        sum[s][r][v] = _mm512_set1_epi32(s == 0 ? start[r] : 0);
    }
  }
  const int64_t groups = padded_k / kGroup;
  int64_t g = 0;
  for (; g + kSums <= groups; g += kSums) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kSums; ++s) {
      multiply_group<kRows, kVectors>(a, panel, sum[s]);
      a += kRowStep;
      panel += kPanelStep;
    }
  }
  for (; g < groups; ++g, a += kRowStep, panel += kPanelStep)
    multiply_group<kRows, kVectors>(a, panel, sum[0]);
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      __m512i total = sum[0][r][v];
      for (int64_t s = 1; s < kSums; ++s) total = _mm512_add_epi32(total, sum[s][r][v]);
      _mm512_storeu_si512(acc + r * kTileColumns + 16 * v, total);
    }
  }
}

#else  // AVX2 and scalar: activations widened to int16 once, G = 2 for AVX2 and all of k for scalar

inline constexpr int32_t kWeightBias = 0;
using RowT = int16_t;

int64_t depth_group(int64_t padded_k);

inline void pack_row_tile(const RowTile& tile, int16_t* packed, int32_t* start) {
  const int64_t padded_k = (tile.k + 3) / 4 * 4;
  const int64_t group = depth_group(padded_k);
  for (int64_t r = 0; r < tile.rows; ++r) {
    start[r] = 0;
    const int8_t* source = tile.a + r * tile.stride;
    for (int64_t i = 0; i < padded_k; i += group) {
      int16_t* target = packed + i * tile.rows + r * group;
      for (int64_t j = 0; j < group; ++j) target[j] = i + j < tile.k ? source[i + j] : int16_t{0};
    }
  }
}

#if MBQ_ISA_ID == MBQ_ISA_ID_avx2

// vpmaddwd on widened bytes: exact, where vpmaddubsw would saturate at int16. Tile: 6 rows x 2
// vectors = 12 accumulators, 2 weights, 1 broadcast. A step of two k is 2 widening loads, 6
// broadcasts, 12 vpmaddwd, 12 vpaddd.
inline constexpr int64_t kTileRows = 6;
inline constexpr int64_t kTileVectors = 2;
inline constexpr int64_t kTileColumns = kTileVectors * 8;
inline constexpr int64_t kGroup = 2;
inline constexpr int64_t kPackingVersion = 1;

inline int64_t depth_group(int64_t) { return kGroup; }

template <int64_t kRows, int64_t kVectors>
inline void multiply_group(const int16_t* a, const int8_t* panel, __m256i (&sum)[kRows][kVectors]) {
  __m256i w[kVectors];
#pragma GCC unroll 2
  for (int64_t v = 0; v < kVectors; ++v) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(panel + 16 * v);
    w[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < kRows; ++r) {
    int32_t two;
    std::memcpy(&two, a + r * kGroup, sizeof(two));
    const __m256i x = _mm256_set1_epi32(two);
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(w[v], x));
    }
  }
}

template <int64_t kRows, int64_t kVectors>
void tile_product(const int16_t* a, const int32_t*, const int8_t* panel, int64_t padded_k,
                  int32_t* acc) {
  __m256i sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < padded_k; i += kGroup) {
    multiply_group<kRows, kVectors>(a + i * kRows, panel + i * kTileColumns, sum);
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      __m256i* target = reinterpret_cast<__m256i*>(acc + r * kTileColumns + 8 * v);
      _mm256_storeu_si256(target, sum[r][v]);
    }
  }
}

#else

// Plain rows and columns: four dot products over k at a time, which the compiler turns into SSE2 or
// NEON.
inline constexpr int64_t kTileRows = 4;
inline constexpr int64_t kTileVectors = 1;
inline constexpr int64_t kTileColumns = 4;
inline constexpr int64_t kPackingVersion = 1;

inline int64_t depth_group(int64_t padded_k) { return padded_k > 0 ? padded_k : 1; }

template <int64_t kRows, int64_t kVectors>
void tile_product(const int16_t* a, const int32_t*, const int8_t* panel, int64_t padded_k,
                  int32_t* acc) {
  const int8_t* w0 = panel;
  const int8_t* w1 = w0 + padded_k;
  const int8_t* w2 = w1 + padded_k;
  const int8_t* w3 = w2 + padded_k;
  for (int64_t r = 0; r < kRows; ++r, a += padded_k, acc += kTileColumns) {
    int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    for (int64_t i = 0; i < padded_k; ++i) {
      sum0 += a[i] * int16_t{w0[i]};
      sum1 += a[i] * int16_t{w1[i]};
      sum2 += a[i] * int16_t{w2[i]};
      sum3 += a[i] * int16_t{w3[i]};
    }
    acc[0] = sum0;
    acc[1] = sum1;
    acc[2] = sum2;
    acc[3] = sum3;
  }
}

#endif
#endif

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
