// The products of a tile: CUTLASS's multistage threadblock Mma for sm_80, behind plain types.
#pragma once

#include <cutlass/gemm/threadblock/default_mma.h>

#include "cuda/common/launch.h"
#include "cuda/gemm_epilogue.cuh"
#include "cuda/gemm_tiles.h"

namespace mambaquant::cuda {

// The config struct of kGemmTiles[kTile].
template <int32_t kTile>
struct GemmTileProduct {
  static constexpr GemmTile kShape = kGemmTiles[kTile];
  static constexpr int32_t kWarpsRows = kShape.warps_rows;
  static constexpr int32_t kWarpRows = kShape.rows / kShape.warps_rows;
  static constexpr int32_t kWarpColumns = kShape.columns / kShape.warps_columns;
  static_assert(kWarpRows % kPieceRows == 0 && kWarpColumns % kPieceColumns == 0);

  using TileShape = cutlass::gemm::GemmShape<kShape.rows, kShape.columns, kShape.depth>;
  using WarpShape = cutlass::gemm::GemmShape<kWarpRows, kWarpColumns, kShape.depth>;
  // Saturating products are the only ones CUTLASS has for int8; sums fit int32 (kMaxK), so that none does.
  using Mma = typename cutlass::gemm::threadblock::DefaultMma<
      int8_t, cutlass::layout::RowMajor, kGemmVectorBytes, int8_t, cutlass::layout::ColumnMajor,
      kGemmVectorBytes, int32_t, cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, TileShape, WarpShape, cutlass::gemm::GemmShape<16, 8, 32>, kShape.stages,
      cutlass::arch::OpMultiplyAddSaturate>::ThreadblockMma;
  using Sums = typename Mma::FragmentC;
  static constexpr int64_t kSharedBytes = sizeof(typename Mma::SharedStorage);
  static_assert(kSharedBytes == kShape.operand_bytes());
  static_assert(Sums::kElements * kShape.multiplying_threads() == kShape.rows * kShape.columns);

  // CUTLASS keeps a warp's 16 x 8 products column of products by column; e: element, as in mma.cuh.
  static __device__ constexpr int32_t sum_index(int32_t row_piece, int32_t group, int32_t e) {
    return (group * (kWarpRows / kPieceRows) + row_piece) * 4 + e;
  }

  // Depths first_depth .. end_depth of the tile at `origin`. Ends with a barrier: `shared` is free.
  static __device__ void multiply(const AlignedOperands& p, const GemmOrigin& origin,
                                  int32_t first_depth, int32_t end_depth, int8_t* shared,
                                  Sums& sums) {
    using IteratorA = typename Mma::IteratorA;
    using IteratorB = typename Mma::IteratorB;
    const auto row = static_cast<int32_t>(origin.row), column = static_cast<int32_t>(origin.column);
    const auto thread = static_cast<int32_t>(threadIdx.x);
    IteratorA a({cutlass::layout::RowMajor(p.a_stride_row)}, const_cast<int8_t*>(p.a),
                {static_cast<int32_t>(p.m), end_depth}, thread, {row, first_depth});
    IteratorB b({cutlass::layout::ColumnMajor(p.k)}, const_cast<int8_t*>(p.weight),
                {end_depth, static_cast<int32_t>(p.n)}, thread, {first_depth, column});
    const int32_t warp = __shfl_sync(kFullMask, thread / kWarpSize, 0);  // uniform to the compiler
    Mma mma(*reinterpret_cast<typename Mma::SharedStorage*>(shared), thread, warp,
            thread % kWarpSize);
    sums.clear();
    mma((end_depth - first_depth + kShape.depth - 1) / kShape.depth, sums, a, b, sums);
  }
};

}  // namespace mambaquant::cuda
