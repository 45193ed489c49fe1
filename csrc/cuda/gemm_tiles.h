// The tiles that the gemm kernels are built for: their traits, in one place. Host and device; no CUDA headers.
#pragma once

#include <cstdint>

namespace mambaquant::cuda {

// How one block multiplies: rows x columns of the result, k bytes of depth per stage.
struct GemmTile {
  const char* name;
  int32_t rows, columns, depth;
  int32_t warps_rows, warps_columns;  // how the warps that multiply share the tile
  int32_t stages;
  bool can_split;         // K among several blocks
  int32_t blocks_per_sm;  // that registers and shared memory of every architecture leave room for

  constexpr int32_t multiplying_threads() const { return warps_rows * warps_columns * 32; }
  constexpr int32_t operand_bytes() const { return (rows + columns) * depth * stages; }
};

// mma.sync, sm_80 and later (gemm_tile_kernel.cuh). All but the first need no more than 48 KB of shared
// memory, so that two blocks fit an SM with 100 KB (sm_86, sm_89, sm_120). The first two hold 128 sums a
// thread: adding up splits takes more registers than are left, and few rows prefer smaller tiles.
inline constexpr GemmTile kGemmTiles[] = {
    {"128x256x64", 128, 256, 64, 2, 4, 3, false, 1},
    {"128x128x64", 128, 128, 64, 2, 2, 3, false, 2},
    {"64x128x64", 64, 128, 64, 2, 2, 4, true, 2},
    {"64x64x128", 64, 64, 128, 2, 2, 3, true, 2},
    {"32x64x128", 32, 64, 128, 2, 2, 4, true, 2},
};
inline constexpr int32_t kNumGemmTiles = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

// wgmma and TMA, sm_90a (gemm_sm90.cu): two warpgroups that multiply and one that loads.
inline constexpr GemmTile kGemmTileSm90 = {"sm90 128x256x128", 128, 256, 128, 8, 1, 4, false, 1};
inline constexpr int32_t kGemmThreadsSm90 = kGemmTileSm90.multiplying_threads() + 128;
// Stages, barriers, and 16 x 40 int32 for each multiplying warp's epilogue; gemm_sm90.cu asserts it.
inline constexpr int32_t kGemmSharedBytesSm90 =
    kGemmTileSm90.operand_bytes() + 8 * 16 * 40 * 4 + 1024;

}  // namespace mambaquant::cuda
