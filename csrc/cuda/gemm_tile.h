// Launchers of the tiled gemm kernels; gemm.cu picks one. No CUTLASS here.
#pragma once

#include "cuda/gemm_operands.h"
#include "cuda/gemm_tiles.h"

namespace mambaquant::cuda {

struct GemmTileParams {
  AlignedOperands operands;
  GemmEpilogueParams epilogue;
  // K is cut into `splits` parts of depth_per_split, a block each. With more than one, the last block to arrive
  // at a tile adds them up.
  int32_t splits = 1;
  int32_t depth_per_split = 0;
  int32_t* partials = nullptr;   // (tiles, splits, rows * columns of a tile)
  uint32_t* arrivals = nullptr;  // (tiles,), zero before the launch
};

// kGemmTiles[kTile].
template <int32_t kTile>
Status launch_gemm_tile(const GemmTileParams& p, Stream stream);

// kGemmTileSm90, on a device of compute capability 9.0. The build may leave it out (cmake/cuda.cmake).
#ifdef MBQ_WITHOUT_SM90A
inline constexpr bool kHasGemmSm90 = false;
inline Status launch_gemm_sm90(const AlignedOperands&, const GemmEpilogueParams&, Stream) {
  return Status::unsupported("this build has no kernels for sm_90a");
}
#else
inline constexpr bool kHasGemmSm90 = true;
Status launch_gemm_sm90(const AlignedOperands& operands, const GemmEpilogueParams& epilogue,
                        Stream stream);
#endif

}  // namespace mambaquant::cuda
