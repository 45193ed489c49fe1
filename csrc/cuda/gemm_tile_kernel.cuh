// gemm for many rows on mma.sync, sm_80 and later. Loads and products are CUTLASS's threadblock-level
// multistage Mma; the epilogue is ours (gemm_epilogue.cuh).
//
// A block owns one tile of the result (gemm_tiles.h); its warps share it as warps_rows x warps_columns.
// Stages of K travel by cp.async into swizzled shared memory while earlier ones are multiplied; rows and
// depths outside of the matrices are filled with zeros. Bound: the tensor cores where tiles are large,
// rows + columns bytes from L2 per rows * columns products where they are small.
// Blocks walk the result in bands of kBandTiles rows of tiles, so that blocks that run together share
// rows of a and of the weight in L2.
// Split K: each block of a tile but the last to arrive leaves its sums in the workspace, in the order of
// its registers (coalesced, 16 bytes a lane); the last adds them to its own. Integer sums: the order
// does not show. Nobody waits.
#pragma once

#include "cuda/gemm_cutlass.cuh"
#include "cuda/gemm_epilogue.cuh"
#include "cuda/gemm_tile.h"

namespace mambaquant::cuda {

inline constexpr int32_t kBandTiles = 8;

// The block's tile and its share of K.
struct GemmTilePlace {
  int64_t tile;
  int32_t row, column;  // of its first element
  int32_t split, first_depth, end_depth;
};

template <int32_t kTile>
__device__ inline GemmTilePlace find_tile(const GemmTileParams& p) {
  constexpr GemmTile kShape = kGemmTiles[kTile];
  const auto m = static_cast<int32_t>(p.operands.m), n = static_cast<int32_t>(p.operands.n);
  const int32_t tile_rows = (m - 1) / kShape.rows + 1, tile_columns = (n - 1) / kShape.columns + 1;
  GemmTilePlace place;
  place.tile = blockIdx.x / static_cast<uint32_t>(p.splits);
  place.split = static_cast<int32_t>(blockIdx.x % static_cast<uint32_t>(p.splits));
  const int64_t band_size = static_cast<int64_t>(kBandTiles) * tile_columns;
  const auto band = static_cast<int32_t>(place.tile / band_size);
  const auto in_band = static_cast<int32_t>(place.tile % band_size);
  const int32_t rows_left = tile_rows - band * kBandTiles;
  const int32_t band_rows = rows_left < kBandTiles ? rows_left : kBandTiles;
  place.row = (band * kBandTiles + in_band % band_rows) * kShape.rows;
  place.column = in_band / band_rows * kShape.columns;
  place.first_depth = place.split * p.depth_per_split;
  place.end_depth = min(place.first_depth + p.depth_per_split, static_cast<int32_t>(p.operands.k));
  return place;
}

// This block's sums, by thread: where registers i .. i + 3 of thread t lie.
template <int32_t kTile>
__device__ inline AccVec* partial_sums(const GemmTileParams& p, const GemmTilePlace& place,
                                       int32_t split) {
  constexpr int64_t kSums = kGemmTiles[kTile].rows * kGemmTiles[kTile].columns;
  int32_t* first = p.partials + (place.tile * p.splits + split) * kSums;
  return reinterpret_cast<AccVec*>(first) + threadIdx.x;
}

// True in the one block of a tile that arrives last, whose acc then holds the sums over all of K.
template <int32_t kTile, typename Fragment>
__device__ inline bool gather_splits(const GemmTileParams& p, const GemmTilePlace& place,
                                     Fragment& acc, uint32_t* shared_arrival) {
  constexpr int32_t kThreads = kGemmTiles[kTile].multiplying_threads();
  constexpr int32_t kVectors = Fragment::kElements / kEpilogueColumns;
  auto* const registers = reinterpret_cast<AccVec*>(&acc);
  AccVec* const own = partial_sums<kTile>(p, place, place.split);
#pragma unroll
  for (int32_t i = 0; i < kVectors; ++i) store_whole(&own[i * kThreads][0], registers[i]);
  __threadfence();  // the sums before the arrival
  __syncthreads();
  if (threadIdx.x == 0) *shared_arrival = atomicAdd(&p.arrivals[place.tile], 1u);
  __syncthreads();
  const uint32_t arrival = *shared_arrival;
  __syncthreads();  // read by all before the epilogue takes the memory
  if (arrival + 1 != static_cast<uint32_t>(p.splits)) return false;
  __threadfence();
  for (int32_t split = 0; split < p.splits; ++split) {
    if (split == place.split) continue;
    const AccVec* const other = partial_sums<kTile>(p, place, split);
#pragma unroll
    for (int32_t i = 0; i < kVectors; ++i) {
      const int4 v = __ldcg(reinterpret_cast<const int4*>(&other[i * kThreads]));
      registers[i][0] += v.x;
      registers[i][1] += v.y;
      registers[i][2] += v.z;
      registers[i][3] += v.w;
    }
  }
  return true;
}

template <int32_t kTile>
__global__ void __launch_bounds__(kGemmTiles[kTile].multiplying_threads(),
                                  kGemmTiles[kTile].blocks_per_sm)
    gemm_tile_kernel(const __grid_constant__ GemmTileParams p) {
  using Product = GemmTileProduct<kTile>;
  extern __shared__ __align__(16) int8_t gemm_tile_shared[];
  const GemmTilePlace place = find_tile<kTile>(p);
  typename Product::Sums acc;
  Product::multiply(p.operands, {place.row, place.column}, place.first_depth, place.end_depth,
                    gemm_tile_shared, acc);
  // From here on the stages are no longer needed.
  if constexpr (kGemmTiles[kTile].can_split) {
    auto* const arrival = reinterpret_cast<uint32_t*>(gemm_tile_shared);
    if (p.splits > 1 && !gather_splits<kTile>(p, place, acc, arrival)) return;
  }
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
  const GemmOrigin origin{place.row + warp % Product::kWarpsRows * Product::kWarpRows,
                          place.column + warp / Product::kWarpsRows * Product::kWarpColumns};
  finish_warp_tile<Product::kWarpRows / kPieceRows, Product::kWarpColumns / kPieceColumns>(
      p.epilogue, origin,
      [&](int32_t i, int32_t j, int32_t e) { return acc[Product::sum_index(i, j, e)]; },
      reinterpret_cast<int32_t*>(gemm_tile_shared) + warp * kPieceInts);
}

template <int32_t kTile>
Status launch_gemm_tile(const GemmTileParams& p, Stream stream) {
  constexpr GemmTile kShape = kGemmTiles[kTile];
  constexpr int32_t kThreads = kShape.multiplying_threads();
  constexpr int64_t kShared = GemmTileProduct<kTile>::kSharedBytes;
  static_assert(kThreads / kWarpSize * kPieceInts * 4 <= kShared, "the epilogue reuses the stages");
  const int64_t blocks =
      ceil_div(p.operands.m, kShape.rows) * ceil_div(p.operands.n, kShape.columns) * p.splits;
  if (blocks > INT32_MAX) return Status::unsupported("expected fewer than 2^31 tiles");
  const auto kernel = gemm_tile_kernel<kTile>;
  const Status allowed = allow_shared_memory(kernel, kShared);
  if (!allowed.is_ok()) return allowed;
  kernel<<<static_cast<uint32_t>(blocks), kThreads, kShared, to_cuda(stream)>>>(p);
  return check_launch();
}

}  // namespace mambaquant::cuda
