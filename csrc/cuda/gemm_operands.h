// What every gemm kernel is given: operands whose rows can be read by 16 bytes, and where results go.
#pragma once

#include <cstdint>

#include "mambaquant/gemm.h"

namespace mambaquant::cuda {

inline constexpr int32_t kGemmVectorBytes = 16;  // kGemmDepthMultiple int8

// Rows of a and weight start at multiples of 16 bytes, and k is a multiple of 16: where the caller's
// a is not like that, a is a padded copy.
struct AlignedOperands {
  int64_t m = 0, n = 0, k = 0;
  int64_t a_stride_row = 0;
  const int8_t* a = nullptr;
  const int8_t* weight = nullptr;  // (N rounded up to kGemmColumnMultiple, k), zero padded
};

enum class GemmOutput : int32_t { kAcc, kF32, kF16, kBF16, kInt8 };

// One description for every operator, so that one kernel serves them all: the branches on it are the
// same for every thread of the grid. Formulas: mambaquant/gemm.h.
struct GemmEpilogueParams {
  int64_t m = 0, n = 0;
  GemmOutput output = GemmOutput::kAcc;
  bool has_vector_columns = false;  // four columns of every array here can be moved at once
  GemmScales scales;
  DType residual_dtype = DType::kF32;
  int64_t residual_stride_row = 0;
  const void* residual = nullptr;           // (M, N); null: none
  const float* out_scale = nullptr;         // (N,), for kInt8
  const int32_t* out_zero_point = nullptr;  // (N,), for kInt8; null: symmetric
  void* out = nullptr;                      // (M, N), contiguous
};

}  // namespace mambaquant::cuda
