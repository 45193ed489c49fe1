// One tile of the matrix product, from its activations and weights to what becomes of its sums, for
// every count of rows and columns that a tile may have.
//
// In the usual cases results are made in the registers that hold the sums: with a small K a detour
// through memory takes as long as the products. What a call may want besides (gemm.cc) is made from
// sums in memory.
#pragma once

#include "cpu/gemm_micro.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

// What a tile leaves behind, whole vectors of it.
enum class Finish : int32_t {
  kSums,     // the int32 sums
  kValues,   // float(sum) * scale: short, since a K like dt_proj's gives it little to hide behind
  kAdded,    // float(sum - offset) * scale + bias + residual
  kRounded,  // int8 of float(sum - offset) * scale + bias, on a symmetric grid
};

// What belongs to the columns of a panel. It lies in memory, since the sums need the registers.
struct ColumnTerms {
  alignas(64) int32_t offset[kTileColumns];
  alignas(64) float scale[kTileColumns];
  alignas(64) float bias[kTileColumns];
  alignas(64) float inv_scale[kTileColumns];
};

struct TileOutput {
  void* out;  // of the first row and column; int32, float or int8, by the finish
  int64_t stride;
  const float* residual;
  int64_t residual_stride;
  bool residual_is_far;  // beyond L2: to be fetched while the products are made
};

struct TileTask {
  Rows rows;
  Weights weights;
  const int32_t* start;  // of the sums of each row
  const ColumnTerms* terms;
  TileOutput output;
};

// One vector of the terms.
struct VectorTerms {
  I32 offset;
  F32 scale, bias, inv_scale;
};

template <Finish kFinish>
MBQ_INLINE inline VectorTerms load_terms(const ColumnTerms& c, int64_t column) {
  VectorTerms t{};
  if constexpr (kFinish != Finish::kSums) t.scale = load(c.scale + column);
  if constexpr (kFinish == Finish::kAdded || kFinish == Finish::kRounded) {
    t.offset = load_i32(c.offset + column);
    t.bias = load(c.bias + column);
  }
  if constexpr (kFinish == Finish::kRounded) t.inv_scale = load(c.inv_scale + column);
  return t;
}

template <Finish kFinish>
MBQ_INLINE inline void finish_vector(const TileOutput& o, const VectorTerms& t, I32 sum,
                                     int64_t row, int64_t column) {
  const int64_t index = row * o.stride + column;
  if constexpr (kFinish == Finish::kSums) {
    store_i32(static_cast<int32_t*>(o.out) + index, sum);
  } else if constexpr (kFinish == Finish::kValues) {
    store(static_cast<float*>(o.out) + index, to_f32(sum) * t.scale);
  } else {
    const F32 value = to_f32(sum - t.offset) * t.scale + t.bias;
    if constexpr (kFinish == Finish::kAdded) {
      const F32 residual = load(o.residual + row * o.residual_stride + column);
      store(static_cast<float*>(o.out) + index, value + residual);
    } else {
      store_symmetric(static_cast<int8_t*>(o.out) + index, value, t.inv_scale);
    }
  }
}

// Into L1. A few lines in each of many rows: no hardware sees them coming.
template <int64_t kRows, int64_t kVectors>
MBQ_INLINE inline void fetch_residual(const TileOutput& o) {
  unrolled<kRows>([&](auto r) MBQ_INLINE {
    const float* const row = o.residual + r * o.residual_stride;
    unrolled<kVectors>([&](auto v) MBQ_INLINE { __builtin_prefetch(row + v * kLanes, 0, 3); });
  });
}

// A function for itself that reads its task where it lies: within the loop over tiles, a compiler
// short of general registers keeps pointers in vector registers, from where they come late.
template <Finish kFinish, int64_t kRows, int64_t kVectors>
void compute_tile(const TileTask& task) {
  I32 sum[kRows][kVectors];
  unrolled<kRows>([&](auto r) MBQ_INLINE {
    unrolled<kVectors>([&](auto v) MBQ_INLINE { sum[r][v] = set1_i32(task.start[r]); });
  });
  if constexpr (kFinish == Finish::kAdded) {
    if (task.output.residual_is_far) fetch_residual<kRows, kVectors>(task.output);
  }
  accumulate(task.rows, task.weights, sum);
  const TileOutput output = task.output;  // a copy: the stores could alias the task
  VectorTerms terms[kVectors];
  unrolled<kVectors>([&](auto v)
                         MBQ_INLINE { terms[v] = load_terms<kFinish>(*task.terms, v * kLanes); });
  unrolled<kRows>([&](auto r) MBQ_INLINE {
    unrolled<kVectors>([&](auto v) MBQ_INLINE {
      finish_vector<kFinish>(output, terms[v], sum[r][v], r, v * kLanes);
    });
  });
}

using TileFunction = void (*)(const TileTask& task);

// For tiles of kTileColumns columns and for those at the edge that have no more than kNarrowVectors.
struct TileFunctions {
  TileFunction full, narrow;
};

template <Finish kFinish, int64_t kRows = kTileRows>
TileFunctions tile_functions(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_functions<kFinish, kRows - 1>(rows);
  }
  return {&compute_tile<kFinish, kRows, kTileVectors>,
          &compute_tile<kFinish, kRows, kNarrowVectors>};
}

inline TileFunctions tile_functions(Finish finish, int64_t rows) {
  switch (finish) {
    case Finish::kValues:
      return tile_functions<Finish::kValues>(rows);
    case Finish::kAdded:
      return tile_functions<Finish::kAdded>(rows);
    case Finish::kRounded:
      return tile_functions<Finish::kRounded>(rows);
    default:
      return tile_functions<Finish::kSums>(rows);
  }
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
