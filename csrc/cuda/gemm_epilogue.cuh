// From int32 sums to results: the one place where the arithmetic of gemm.h is written for the device.
//   value = float(acc - acc_offset) * (a_scale * b_scale) [+ bias] [+ residual]
// Every operation is rounded on its own (__fmul_rn and __fadd_rn are never contracted), so that all
// kernels give the bits of the float32 reference, whatever their tiles.
//
// A thread finishes four neighbouring columns of a row. Its columns stay the same while it walks down
// the rows, so that scales are loaded and 1 / out_scale is computed once per column, not per element.
// The tensor cores leave a row's sums in pairs in four lanes; a warp turns 16 rows x 32 columns of
// them over in 2.5 KB of shared memory of its own (no barrier of the block), after which eight lanes
// hold a row: 128 bytes of float32 or int32, 64 of half, 32 of int8, whole sectors each.
#pragma once

#include "cuda/common/quant.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/gemm_operands.h"

namespace mambaquant::cuda {

inline constexpr int32_t kEpilogueColumns = 4;  // of a thread
inline constexpr int32_t kPieceRows = 16, kPieceColumns = 32;
inline constexpr int32_t kPieceSteps = 4;  // rows of a piece that a thread finishes
// Rows eight banks apart: neither the pairs written nor the fours read meet in a bank.
inline constexpr int32_t kPieceStride = kPieceColumns + 8;
inline constexpr int32_t kPieceInts = kPieceRows * kPieceStride;

using AccVec = Vec<int32_t, kEpilogueColumns>;
using FloatVec = Vec<float, kEpilogueColumns>;

// Four neighbours of an array; those from `count` on are 0.
template <typename T>
__device__ inline Vec<T, kEpilogueColumns> load_columns(const T* p, int32_t count,
                                                        bool has_vector_columns) {
  if (has_vector_columns) return load_vec<kEpilogueColumns>(p);
  Vec<T, kEpilogueColumns> v{};
#pragma unroll
  for (int32_t i = 0; i < kEpilogueColumns; ++i) {
    if (i < count) v[i] = p[i];
  }
  return v;
}

// One instruction for sure: as plain assignments, the compiler would merge the vector's stores with those
// of the path beside it into predicated single ones.
template <typename T>
__device__ inline void store_whole(T* p, const Vec<T, kEpilogueColumns>& v) {
  if constexpr (sizeof(v) == 16) {
    __stwb(reinterpret_cast<uint4*>(p), __builtin_bit_cast(uint4, v));
  } else if constexpr (sizeof(v) == 8) {
    __stwb(reinterpret_cast<uint2*>(p), __builtin_bit_cast(uint2, v));
  } else {
    __stwb(reinterpret_cast<uint32_t*>(p), __builtin_bit_cast(uint32_t, v));
  }
}

template <typename T>
__device__ inline void store_columns(T* p, const Vec<T, kEpilogueColumns>& v, int32_t count,
                                     bool has_vector_columns) {
  if (has_vector_columns) {
    store_whole(p, v);
    return;
  }
#pragma unroll
  for (int32_t i = 0; i < kEpilogueColumns; ++i) {
    if (i < count) p[i] = v[i];
  }
}

// x + -0 is x, for x = -0 too, which x + 0 is not: what stands for an absent bias or residual.
__device__ inline FloatVec nothing_to_add() { return {{-0.0f, -0.0f, -0.0f, -0.0f}}; }

// What a thread keeps about its columns.
struct GemmColumns {
  int64_t first;
  int32_t count;   // of the four that lie inside the matrix; 0 or less: none
  FloatVec scale;  // a_scale * b_scale, or b_scale where a_scale is per token
  FloatVec bias;
  AccVec acc_offset;
  FloatVec inv_out_scale, lowest, highest;  // for kInt8, as are the zero points
  AccVec zero_point;
};

// NOTE(rounding-by-addition): int8 results are rounded by adding 1.5 * 2^23, which leaves the integer
// nearest (ties to even) in the low bits of the sum: one addition, where rounding and conversion are two
// instructions at a quarter of its rate. quant.cuh adds the zero point before it clamps; clamping to
// [qmin - zero_point, 127 - zero_point] before rounding gives the same, as the bounds are integers. The
// addition needs bounds below 2^22, so that zero points are taken as at most 2^21 (int8 needs 2^8).
inline constexpr float kRoundingAddend = 12582912.0f;
inline constexpr int32_t kLargestZeroPoint = 1 << 21;

__device__ inline void load_output_grid(const GemmEpilogueParams& p, GemmColumns& c) {
  const FloatVec out_scale = load_columns(p.out_scale + c.first, c.count, p.has_vector_columns);
  const bool is_symmetric = p.out_zero_point == nullptr;
  if (!is_symmetric) {
    c.zero_point = load_columns(p.out_zero_point + c.first, c.count, p.has_vector_columns);
  }
  const int32_t qmin = is_symmetric ? kQMinSymmetric : kQMinAsymmetric;
#pragma unroll
  for (int32_t i = 0; i < kEpilogueColumns; ++i) {
    c.zero_point[i] = max(-kLargestZeroPoint, min(c.zero_point[i], kLargestZeroPoint));
    c.inv_out_scale[i] = inverse(out_scale[i]);
    c.lowest[i] = static_cast<float>(qmin - c.zero_point[i]);
    c.highest[i] = static_cast<float>(kQMax - c.zero_point[i]);
  }
}

__device__ inline GemmColumns make_columns(const GemmEpilogueParams& p, int64_t first) {
  GemmColumns c{};
  c.first = first;
  c.count = p.n - first < kEpilogueColumns ? static_cast<int32_t>(p.n - first) : kEpilogueColumns;
  if (c.count <= 0 || p.output == GemmOutput::kAcc) return c;
  const bool vec = p.has_vector_columns;
  c.scale = load_columns(p.scales.b_scale + first, c.count, vec);
  if (!p.scales.a_scale_is_per_token) {
    const float a_scale = p.scales.a_scale[0];
#pragma unroll
    for (int32_t i = 0; i < kEpilogueColumns; ++i) c.scale[i] = __fmul_rn(a_scale, c.scale[i]);
  }
  if (p.scales.acc_offset != nullptr) {
    c.acc_offset = load_columns(p.scales.acc_offset + first, c.count, vec);
  }
  c.bias = p.scales.bias == nullptr ? nothing_to_add()
                                    : load_columns(p.scales.bias + first, c.count, vec);
  if (p.output == GemmOutput::kInt8) load_output_grid(p, c);
  return c;
}

template <typename T>
__device__ inline FloatVec load_floats(const void* from, int64_t index, int32_t count, bool vec) {
  const auto v = load_columns(static_cast<const T*>(from) + index, count, vec);
  return {{to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])}};
}

// What is added to a row in a thread's columns.
__device__ inline FloatVec load_residual(const GemmEpilogueParams& p, const GemmColumns& c,
                                         int64_t row) {
  if (p.residual == nullptr || row >= p.m || c.count <= 0) return nothing_to_add();
  const int64_t index = row * p.residual_stride_row + c.first;
  if (p.residual_dtype == DType::kF32) {
    return load_floats<float>(p.residual, index, c.count, p.has_vector_columns);
  }
  if (p.residual_dtype == DType::kF16) {
    return load_floats<__half>(p.residual, index, c.count, p.has_vector_columns);
  }
  return load_floats<__nv_bfloat16>(p.residual, index, c.count, p.has_vector_columns);
}

__device__ inline FloatVec dequantize_columns(const GemmEpilogueParams& p, const GemmColumns& c,
                                              int64_t row, const AccVec& acc,
                                              const FloatVec& residual) {
  FloatVec scale = c.scale, value;
  if (p.scales.a_scale_is_per_token) {
    const float a_scale = p.scales.a_scale[row];
#pragma unroll
    for (int32_t i = 0; i < kEpilogueColumns; ++i) scale[i] = __fmul_rn(a_scale, scale[i]);
  }
#pragma unroll
  for (int32_t i = 0; i < kEpilogueColumns; ++i) {
    const float sum = __int2float_rn(acc[i] - c.acc_offset[i]);
    value[i] = __fadd_rn(__fadd_rn(__fmul_rn(sum, scale[i]), c.bias[i]), residual[i]);
  }
  return value;
}

template <typename T>
__device__ inline void store_floats(const GemmEpilogueParams& p, const GemmColumns& c,
                                    int64_t index, const FloatVec& value) {
  Vec<T, kEpilogueColumns> out;
#pragma unroll
  for (int32_t i = 0; i < kEpilogueColumns; ++i) out[i] = from_float<T>(value[i]);
  store_columns(static_cast<T*>(p.out) + index, out, c.count, p.has_vector_columns);
}

__device__ inline void store_int8(const GemmEpilogueParams& p, const GemmColumns& c, int64_t index,
                                  const FloatVec& value) {
  Vec<int8_t, kEpilogueColumns> out;
#pragma unroll
  for (int32_t i = 0; i < kEpilogueColumns; ++i) {
    // NaN gives 127, like +inf: fminf returns its other operand.
    const float q = __fmul_rn(value[i], c.inv_out_scale[i]);
    const float clamped = fmaxf(fminf(q, c.highest[i]), c.lowest[i]);
    const int32_t rounded = __float_as_int(__fadd_rn(clamped, kRoundingAddend));
    out[i] = static_cast<int8_t>(rounded + c.zero_point[i]);
  }
  store_columns(static_cast<int8_t*>(p.out) + index, out, c.count, p.has_vector_columns);
}

// The sums of a row in a thread's columns become results. Nothing happens outside of the matrix.
__device__ inline void finish_columns(const GemmEpilogueParams& p, const GemmColumns& c,
                                      int64_t row, const AccVec& acc, const FloatVec& residual) {
  if (row >= p.m || c.count <= 0) return;
  const int64_t index = row * p.n + c.first;
  if (p.output == GemmOutput::kAcc) {
    store_columns(static_cast<int32_t*>(p.out) + index, acc, c.count, p.has_vector_columns);
    return;
  }
  const FloatVec value = dequantize_columns(p, c, row, acc, residual);
  switch (p.output) {
    case GemmOutput::kF32:
      return store_floats<float>(p, c, index, value);
    case GemmOutput::kF16:
      return store_floats<__half>(p, c, index, value);
    case GemmOutput::kBF16:
      return store_floats<__nv_bfloat16>(p, c, index, value);
    default:
      return store_int8(p, c, index, value);
  }
}

// Where the first row and column of a warp's share of the result lie.
struct GemmOrigin {
  int64_t row, column;
};

// A warp's sums, kRowPieces x kColumnPieces pieces of 16 x 32, as m16n8 products leave them:
// fragment(i, j, e) is element e (mma.cuh) of the 16 x 8 product in row piece i, 8-column group j.
// `piece` holds kPieceInts of shared memory that no other warp uses.
template <int32_t kRowPieces, int32_t kColumnPieces, typename Fragment>
__device__ inline void finish_warp_tile(const GemmEpilogueParams& p, const GemmOrigin& origin,
                                        const Fragment& fragment, int32_t* piece) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  int32_t* const pairs = piece + lane / 4 * kPieceStride + lane % 4 * 2;
  const int32_t first_row = lane / 8, column = lane % 8 * kEpilogueColumns;
#pragma unroll
  for (int32_t j = 0; j < kColumnPieces; ++j) {
    const GemmColumns c = make_columns(p, origin.column + j * kPieceColumns + column);
#pragma unroll
    for (int32_t i = 0; i < kRowPieces; ++i) {
      const int64_t row = origin.row + i * kPieceRows + first_row;
      FloatVec residual[kPieceSteps];
      // All requested before any is used; stores below could alias them.
#pragma unroll
      for (int32_t s = 0; s < kPieceSteps; ++s) residual[s] = load_residual(p, c, row + s * 4);
      __syncwarp();  // the last piece has been read
#pragma unroll
      for (int32_t e = 0; e < kPieceColumns / 4; ++e) {
        const int32_t group = e / 2, half = e % 2 * 2;
        const Vec<int32_t, 2> pair{
            {fragment(i, j * 4 + group, half), fragment(i, j * 4 + group, half + 1)}};
        store_vec(pairs + e % 2 * 8 * kPieceStride + group * 8, pair);
      }
      __syncwarp();
#pragma unroll
      for (int32_t s = 0; s < kPieceSteps; ++s) {
        const int32_t* const sums = piece + (s * 4 + first_row) * kPieceStride + column;
        finish_columns(p, c, row + s * 4, load_vec<kEpilogueColumns>(sums), residual[s]);
      }
    }
  }
}

}  // namespace mambaquant::cuda
