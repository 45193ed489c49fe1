// gemm for few rows of a (decode): each weight byte is read once for all of them.
//
// Bound: bytes, N * K of the weight; 2 * M * K operations per 16 * K bytes keep the tensor cores idle
// for the most part. The weight is the 16-row operand of m16n8k32, the activations its 8 columns, so
// that 8 rows cost the same instructions as one.
//   A block owns 16 weight rows and 8 * kRowTiles rows of a; its warps take chunks of 64 bytes of K in
//   turn. Lane 4g + q reads 16 bytes at depth 16q of weight rows g and g + 8 and of row g of a: whole
//   64-byte pieces of a row. A depth in one operand may stand where the instruction expects another
//   as long as it does in both, so that words 0 and 1 of the 16 bytes feed one product, 2 and 3 the next.
//   kUnroll chunks are requested before the first is used: 8 x 16 bytes of weight a lane.
// The warps' sums meet in shared memory; then a thread finishes four columns.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/gemm_epilogue.cuh"

namespace mambaquant::cuda {

struct SmallGemmTraits {
  static constexpr int32_t kColumns = 16;  // weight rows of a block
  static constexpr int32_t kRowTile = 8;   // rows of a in one product
  static constexpr int32_t kChunk = 64;    // bytes of K that a warp reads of a row at once
  static constexpr int32_t kUnroll = 4;
  static constexpr int32_t kMaxWarps = 8;
  static constexpr int32_t kMaxThreads = kMaxWarps * kWarpSize;
  // Pairs of rows 2q apart land eight banks apart when sums are written; fours stay aligned.
  static constexpr int32_t kSumStride = kColumns + 4;
  static_assert(kGemmColumnMultiple % kColumns == 0, "weight rows need no bounds");
};

// Warps that split K: one per full batch of chunks.
constexpr int32_t small_gemm_warps(int64_t k) {
  using T = SmallGemmTraits;
  const int64_t batches = (k + T::kChunk * T::kUnroll - 1) / (T::kChunk * T::kUnroll);
  return static_cast<int32_t>(batches < 1 ? 1 : batches < T::kMaxWarps ? batches : T::kMaxWarps);
}

using Words = Vec<uint32_t, 4>;

// 16 bytes of the weight: read once, so that L1 need not keep them.
__device__ inline Words load_weight(const int8_t* p) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// Where a lane reads, at depth 0.
template <int32_t kRowTiles>
struct SmallGemmRows {
  const int8_t* weight[2];
  const int8_t* a[kRowTiles];
};

template <int32_t kRowTiles>
__device__ inline SmallGemmRows<kRowTiles> find_rows(const AlignedOperands& p, int64_t row,
                                                     int64_t column) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  const int32_t g = lane / 4, depth = lane % 4 * kGemmVectorBytes;
  SmallGemmRows<kRowTiles> rows;
  rows.weight[0] = p.weight + (column + g) * p.k + depth;
  rows.weight[1] = rows.weight[0] + 8 * p.k;
#pragma unroll
  for (int32_t t = 0; t < kRowTiles; ++t) {
    // A row beyond the last is read as the last: its sums are not stored.
    const int64_t r = row + t * SmallGemmTraits::kRowTile + g;
    rows.a[t] = p.a + (r < p.m ? r : p.m - 1) * p.a_stride_row + depth;
  }
  return rows;
}

template <int32_t kRowTiles>
__device__ inline void multiply_chunk(int32_t (&acc)[kRowTiles][4], const Words (&weight)[2],
                                      const Words (&a)[kRowTiles]) {
#pragma unroll
  for (int32_t half = 0; half < 4; half += 2) {
    const uint32_t w[4] = {weight[0][half], weight[1][half], weight[0][half + 1],
                           weight[1][half + 1]};
#pragma unroll
    for (int32_t t = 0; t < kRowTiles; ++t) {
      const uint32_t x[2] = {a[t][half], a[t][half + 1]};
      mma_m16n8k32(acc[t], w, x);
    }
  }
}

// Adds kUnroll chunks, `step` apart, the first at depth `chunk`. In a full batch all of them lie within k;
// else zeros stand for what does not.
template <int32_t kRowTiles, bool kIsFull>
__device__ inline void add_batch(const SmallGemmRows<kRowTiles>& rows, int32_t chunk, int32_t step,
                                 int32_t k, int32_t (&acc)[kRowTiles][4]) {
  using T = SmallGemmTraits;
  const int32_t depth = static_cast<int32_t>(threadIdx.x) % 4 * kGemmVectorBytes;
  Words weight[T::kUnroll][2], a[T::kUnroll][kRowTiles];
#pragma unroll
  for (int32_t u = 0; u < T::kUnroll; ++u) {
    const int32_t at = chunk + u * step;
    const bool is_inside = kIsFull || at + depth < k;
    weight[u][0] = is_inside ? load_weight(rows.weight[0] + at) : Words{};
    weight[u][1] = is_inside ? load_weight(rows.weight[1] + at) : Words{};
#pragma unroll
    for (int32_t t = 0; t < kRowTiles; ++t) {
      a[u][t] =
          is_inside ? load_vec<4>(reinterpret_cast<const uint32_t*>(rows.a[t] + at)) : Words{};
    }
  }
#pragma unroll
  for (int32_t u = 0; u < T::kUnroll; ++u) multiply_chunk<kRowTiles>(acc, weight[u], a[u]);
}

// The sums of this warp's share of K.
template <int32_t kRowTiles>
__device__ inline void sum_chunks(const AlignedOperands& p, const SmallGemmRows<kRowTiles>& rows,
                                  int32_t (&acc)[kRowTiles][4]) {
  using T = SmallGemmTraits;
  const auto k = static_cast<int32_t>(p.k);
  const int32_t step = static_cast<int32_t>(blockDim.x) / kWarpSize * T::kChunk;
  int32_t chunk = static_cast<int32_t>(threadIdx.x) / kWarpSize * T::kChunk;
  for (; chunk + (T::kUnroll - 1) * step + T::kChunk <= k; chunk += T::kUnroll * step) {
    add_batch<kRowTiles, true>(rows, chunk, step, k, acc);
  }
  if (chunk < k) add_batch<kRowTiles, false>(rows, chunk, step, k, acc);
}

// Sums as [row of a][weight row], four of a row together.
template <int32_t kRowTiles>
__device__ inline void store_sums(const int32_t (&acc)[kRowTiles][4], int32_t* sums) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  const int32_t g = lane / 4, q = lane % 4;
#pragma unroll
  for (int32_t t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int32_t e = 0; e < 4; ++e) {
      const int32_t row = t * SmallGemmTraits::kRowTile + 2 * q + e % 2;
      sums[row * SmallGemmTraits::kSumStride + g + e / 2 * 8] = acc[t][e];
    }
  }
}

template <int32_t kRowTiles>
__global__ void __launch_bounds__(SmallGemmTraits::kMaxThreads)
    gemm_small_kernel(const __grid_constant__ AlignedOperands p,
                      const __grid_constant__ GemmEpilogueParams epilogue) {
  using T = SmallGemmTraits;
  constexpr int32_t kRows = kRowTiles * T::kRowTile;
  constexpr int32_t kGroups = T::kColumns / kEpilogueColumns;  // of a row
  static_assert(kGroups == 4);
  __shared__ alignas(16) int32_t sums[T::kMaxWarps][kRows * T::kSumStride];
  const int64_t column_blocks = (p.n + T::kColumns - 1) / T::kColumns;
  const int64_t column = blockIdx.x % column_blocks * T::kColumns;
  const int64_t row = blockIdx.x / column_blocks * kRows;

  int32_t acc[kRowTiles][4] = {};
  sum_chunks<kRowTiles>(p, find_rows<kRowTiles>(p, row, column), acc);
  store_sums<kRowTiles>(acc, sums[threadIdx.x / kWarpSize]);
  __syncthreads();

  const int32_t warps = static_cast<int32_t>(blockDim.x) / kWarpSize;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRows * kGroups;
       i += static_cast<int32_t>(blockDim.x)) {
    // Lanes 4 .. 7 read four rows below lanes 0 .. 3: 16 banks away.
    const int32_t r = i / 32 * T::kRowTile + i / 4 % 2 * 4 + i / 8 % 4;
    const int32_t c = i % kGroups * kEpilogueColumns;
    if (row + r >= p.m) continue;
    const GemmColumns columns = make_columns(epilogue, column + c);
    GemmRows<1> finished{row + r, {}, {}};
    load_residual(epilogue, columns, finished);
    for (int32_t w = 0; w < warps; ++w) {
      const AccVec part = load_vec<kEpilogueColumns>(&sums[w][r * T::kSumStride + c]);
#pragma unroll
      for (int32_t e = 0; e < kEpilogueColumns; ++e) finished.acc[0][e] += part[e];
    }
    finish_rows(epilogue, columns, finished);
  }
}

}  // namespace mambaquant::cuda
