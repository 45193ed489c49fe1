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
// Eight lanes hold a row of a piece; a thread's rows are this far apart.
inline constexpr int32_t kRowStep = 4;
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

// NOTE(zero-point-in-bounds): an int8 result is rounded by adding kRounder (common/bytes.cuh). quant.cuh adds
// the zero point before it clamps; clamping to [qmin - zero_point, 127 - zero_point] before rounding gives the
// same, as the bounds are integers. The addition needs bounds below 2^22, so that zero points are taken as at
// most 2^21 (int8 needs 2^8).
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

// What a thread knows of kRows rows, kRowStep apart, in its columns.
template <int32_t kRows>
struct GemmRows {
  int64_t first;
  AccVec acc[kRows];
  FloatVec value[kRows];  // first the residual, then the result
};

template <typename T, int32_t kRows>
__device__ inline void load_residual_as(const GemmEpilogueParams& p, const GemmColumns& c,
                                        GemmRows<kRows>& rows) {
  const T* from = static_cast<const T*>(p.residual) + rows.first * p.residual_stride_row + c.first;
#pragma unroll
  for (int32_t r = 0; r < kRows; ++r) {
    if (rows.first + r * kRowStep < p.m) {
      const auto v = load_columns(from, c.count, p.has_vector_columns);
      rows.value[r] = {{to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])}};
    }
    from += kRowStep * p.residual_stride_row;
  }
}

// Requests what is to be added to every row before any of it is used: stores could alias it, so that the
// compiler would not.
template <int32_t kRows>
__device__ inline void load_residual(const GemmEpilogueParams& p, const GemmColumns& c,
                                     GemmRows<kRows>& rows) {
#pragma unroll
  for (int32_t r = 0; r < kRows; ++r) rows.value[r] = nothing_to_add();
  if (p.residual == nullptr || c.count <= 0) return;
  if (p.residual_dtype == DType::kF32) {
    load_residual_as<float>(p, c, rows);
  } else if (p.residual_dtype == DType::kF16) {
    load_residual_as<__half>(p, c, rows);
  } else {
    load_residual_as<__nv_bfloat16>(p, c, rows);
  }
}

template <int32_t kRows>
__device__ inline void dequantize_rows(const GemmEpilogueParams& p, const GemmColumns& c,
                                       GemmRows<kRows>& rows) {
  float a_scale[kRows];
  const bool is_per_token = p.scales.a_scale_is_per_token;
#pragma unroll
  for (int32_t r = 0; r < kRows; ++r) {
    const int64_t row = rows.first + r * kRowStep;
    a_scale[r] = is_per_token && row < p.m ? p.scales.a_scale[row] : 1.0f;  // x * 1 is x
  }
#pragma unroll
  for (int32_t r = 0; r < kRows; ++r) {
#pragma unroll
    for (int32_t i = 0; i < kEpilogueColumns; ++i) {
      const float sum = __int2float_rn(rows.acc[r][i] - c.acc_offset[i]);
      const float product = __fmul_rn(sum, __fmul_rn(a_scale[r], c.scale[i]));
      rows.value[r][i] = __fadd_rn(__fadd_rn(product, c.bias[i]), rows.value[r][i]);
    }
  }
}

// Stores convert(r), the kEpilogueColumns results of row r, where the row lies inside the matrix.
template <typename T, int32_t kRows, typename Convert>
__device__ inline void store_rows(const GemmEpilogueParams& p, const GemmColumns& c, int64_t first,
                                  const Convert& convert) {
  T* to = static_cast<T*>(p.out) + first * p.n + c.first;
#pragma unroll
  for (int32_t r = 0; r < kRows; ++r) {
    if (first + r * kRowStep < p.m) store_columns(to, convert(r), c.count, p.has_vector_columns);
    to += kRowStep * p.n;
  }
}

template <typename T, int32_t kRows>
__device__ inline void store_floats(const GemmEpilogueParams& p, const GemmColumns& c,
                                    const GemmRows<kRows>& rows) {
  store_rows<T, kRows>(p, c, rows.first, [&](int32_t r) {
    Vec<T, kEpilogueColumns> out;
#pragma unroll
    for (int32_t i = 0; i < kEpilogueColumns; ++i) out[i] = from_float<T>(rows.value[r][i]);
    return out;
  });
}

template <int32_t kRows>
__device__ inline void store_int8(const GemmEpilogueParams& p, const GemmColumns& c,
                                  const GemmRows<kRows>& rows) {
  store_rows<int8_t, kRows>(p, c, rows.first, [&](int32_t r) {
    Vec<int8_t, kEpilogueColumns> out;
#pragma unroll
    for (int32_t i = 0; i < kEpilogueColumns; ++i) {
      // NaN gives 127, like +inf: fminf returns its other operand.
      const float q = __fmul_rn(rows.value[r][i], c.inv_out_scale[i]);
      const float clamped = fmaxf(fminf(q, c.highest[i]), c.lowest[i]);
      const int32_t rounded = __float_as_int(__fadd_rn(clamped, kRounder));
      out[i] = static_cast<int8_t>(rounded + c.zero_point[i]);
    }
    return out;
  });
}

// Sums become results. Nothing happens outside of the matrix. The branch on the output is taken once for
// kRows rows.
template <int32_t kRows>
__device__ inline void finish_rows(const GemmEpilogueParams& p, const GemmColumns& c,
                                   GemmRows<kRows>& rows) {
  if (c.count <= 0) return;
  if (p.output == GemmOutput::kAcc) {
    store_rows<int32_t, kRows>(p, c, rows.first, [&](int32_t r) { return rows.acc[r]; });
    return;
  }
  dequantize_rows(p, c, rows);
  switch (p.output) {
    case GemmOutput::kF32:
      return store_floats<float>(p, c, rows);
    case GemmOutput::kF16:
      return store_floats<__half>(p, c, rows);
    case GemmOutput::kBF16:
      return store_floats<__nv_bfloat16>(p, c, rows);
    default:
      return store_int8(p, c, rows);
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
      GemmRows<kPieceRows / kRowStep> rows;
      rows.first = origin.row + i * kPieceRows + first_row;
      load_residual(p, c, rows);
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
      for (int32_t r = 0; r < kPieceRows / kRowStep; ++r) {
        const int32_t in_piece = first_row + r * kRowStep;
        rows.acc[r] = load_vec<kEpilogueColumns>(piece + in_piece * kPieceStride + column);
      }
      finish_rows(p, c, rows);
    }
  }
}

}  // namespace mambaquant::cuda
