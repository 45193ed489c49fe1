// hadamard_transform, hadamard_quantize on the device; formulas in mambaquant/hadamard.h.
//
//   rows     (hadamard_rows.cuh) a token is kRows rows of 2^b elements. A team of lanes loads a row, 16
//            bytes a lane, 32 elements each where the row has 64 or more: five stages of H_{2^b} in
//            registers and b - 5 by shuffles, then 16-byte stores to the tile, swizzled.
//   columns  (hadamard_columns.cuh) a thread takes 1, 2 or 4 neighbouring columns of every row from the
//            tile, four rows at a time, and adds them to all kRows results: kOrder / 4 + 2.5 additions an
//            element, the signs known to the compiler. For powers of two they are stages in registers.
//   finish   (hadamard_finish.cuh) max|y| over the token's threads where the scale is dynamic; 1 / sqrt(dim)
//            and 1 / scale as one factor; rows of 32 elements and more straight to global memory, shorter
//            ones through the tile.
//
// x is read once and the result written once, 3 bytes an element from half precision to int8, and 8 bytes
// an element go through shared memory (10 to 13 for rows below 32 elements), without bank conflicts.
// Thread instructions of the PTX for an element, static scale: 38 for dim 1536, 34 for 2048, 39 for 4096, 40
// for 5120, of which 7 to 9 are moves that are no instructions of the machine; 2 or 3 are shuffles. Bound by
// bytes, with instructions close behind. dtype, kind of result, b and direction are branches that are the
// same for all threads, not instantiations: a shape's signs are most of its code.
// Registers: 128 at most, but up to 177 for order 44 and 150 for the smaller sizes of order 60.
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
