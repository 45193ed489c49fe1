// hadamard_transform, hadamard_quantize on the device; formulas in mambaquant/hadamard.h.
#pragma once

#include "cuda/hadamard_finish.cuh"

namespace mambaquant::cuda {

// Every round's rows through the tile into acc.
template <typename Shape, int32_t kFirst = 0>
__device__ inline void take_all_rows(const TokenTile& tokens, const ColumnReader<Shape>& reader,
                                     bool is_transposed, float* tile, float* acc) {
  if constexpr (kFirst < Shape::kRows) {
    constexpr int32_t kRest = Shape::kRows - kFirst;
    constexpr int32_t kTileRows = kRest < Shape::kRoundRows ? kRest : Shape::kRoundRows;
    if constexpr (kFirst > 0) __syncthreads();  // the round before has been read
    transform_rows<Shape, kTileRows>(tokens, kFirst, tile);
    __syncthreads();
    take_rows<Shape, kFirst, kFirst + kTileRows>(reader, acc);
    if constexpr (kHasSkewBase<Shape>) {
      if (is_transposed) {
        __syncwarp();  // or the compiler keeps what take_rows loaded, and spills
        subtract_rows_twice<Shape, kFirst, kFirst + kTileRows>(reader, acc);
      }
    }
    take_all_rows<Shape, kFirst + kTileRows>(tokens, reader, is_transposed, tile, acc);
  }
}

template <typename Shape>
__device__ inline int32_t tokens_of_block(int64_t left, int32_t tokens_log) {
  if constexpr (Shape::one_token()) return 1;
  return left < 1 << tokens_log ? static_cast<int32_t>(left) : 1 << tokens_log;
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kMinBlocks)
    hadamard_kernel(const __grid_constant__ HadamardParams p,
                    const __grid_constant__ HadamardPlan launch_plan) {
  HadamardPlan plan = launch_plan;
  if constexpr (Shape::kOneLength) plan.row_log = Shape::kMinLog;
  if constexpr (Shape::one_token()) plan.tokens_log = 0;
  extern __shared__ __align__(128) float shared[];
  float* tile = shared + kReduceFloats;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) << plan.tokens_log;
  const int32_t count = tokens_of_block<Shape>(p.tokens - first_token, plan.tokens_log);
  const int64_t x_offset = first_token * p.x_stride_token;
  const TokenTile tokens{plan, advanced(p.x, p.x_dtype, x_offset), p.x_stride_token, p.x_dtype,
                         count};
  const ColumnPlace<Shape> place(plan.row_log);
  const ColumnReader<Shape> reader(tile, place, plan.row_log);

  float acc[Shape::kValues];
  take_all_rows(tokens, reader, p.inverse, tile, acc);
  finish_columns<Shape>(p.inverse, acc);

  const int64_t out_offset = first_token * p.dim;
  if (p.q != nullptr) {
    const float factor =
        quantize_factor(p, plan.norm, first_token + place.token, acc, place, plan.row_log, shared);
    store_tokens(acc, factor, count, plan.row_log, place, tile, p.q + out_offset);
  } else if (p.x_dtype == DType::kF32) {
    store_tokens(acc, plan.norm, count, plan.row_log, place, tile,
                 static_cast<float*>(p.y) + out_offset);
  } else if (p.x_dtype == DType::kF16) {
    store_tokens(acc, plan.norm, count, plan.row_log, place, tile,
                 static_cast<__half*>(p.y) + out_offset);
  } else {
    store_tokens(acc, plan.norm, count, plan.row_log, place, tile,
                 static_cast<__nv_bfloat16*>(p.y) + out_offset);
  }
}

}  // namespace mambaquant::cuda
