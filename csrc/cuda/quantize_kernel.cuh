// quantize, dequantize on the device. Formulas: mambaquant/quantize.h.
//
// Bound: bytes. Every kernel moves vectors of 16 bytes of the float side (8 of 16 bits or 4 floats;
// 1 element where width, stride or start fit nothing wider), neighbouring lanes neighbouring vectors, and
// has four of them in flight per thread.
//   scale_rows_kernel       one scale a row or in all: threads along rows
//   scale_columns_kernel    one scale a column: a thread keeps its columns' scales and walks down tokens
//   quantize_tokens_kernel  dynamic per token: a row stays in registers between amax and rounding
//   amax_kernel             dynamic per tensor and per channel, which need x twice: max|x|, whose bits
//                           order like integers for floats >= 0, by atomicMax, exact in any order
// Rounding takes 5 instructions an element, a conversion from 16 bits 1, packing 3 for 4 elements.
#pragma once

#include "cuda/common/quant.cuh"
#include "cuda/common/row.cuh"
#include "mambaquant/quantize.h"

namespace mambaquant::cuda {

inline constexpr int32_t kQuantizeThreads = 256;
inline constexpr int32_t kVectorsInFlight = 4;
inline constexpr int32_t kTileWarps = kQuantizeThreads / kWarpSize;
inline constexpr int32_t kMaxTokenThreads = 1024;
inline constexpr int32_t kTokenValues = 16;  // elements of a row that a thread keeps

// What a vector is multiplied by and what zero is: the same for all its elements, or not.
struct SharedGrid {
  float common_factor, common_zero_point;
  __device__ float factor(int32_t) const { return common_factor; }
  __device__ float zero_point(int32_t) const { return common_zero_point; }
};
template <int32_t kVec>
struct ChannelGrid {
  float factors[kVec], zero_points[kVec];
  __device__ float factor(int32_t i) const { return factors[i]; }
  __device__ float zero_point(int32_t i) const { return zero_points[i]; }
};

// Vectors of 8 hold 16-bit elements and those of 4 floats; single elements are any of the three.
template <int32_t kVec>
__device__ inline DType dtype_of_vectors(DType dtype) {
  return kVec == 4 ? DType::kF32 : dtype;
}

// The two directions, at one place of the matrix. load() begins to read the vector `offset` elements
// further on in the row, finish() converts and stores it.
template <int32_t kVecWidth>
struct QuantizeOp {
  using Params = QuantizeParams;
  static constexpr int32_t kVec = kVecWidth;
  using Loaded = RawVec<kVec>;

  DType dtype;
  const void* x;
  int8_t* q;
  float qmin;

  __device__ QuantizeOp(const Params& p, int64_t token, int64_t column)
      : dtype(dtype_of_vectors<kVec>(p.x_dtype)),
        x(advance(p.x, token * p.x_stride_token + column, dtype)),
        q(p.q + token * p.dim + column),
        qmin(static_cast<float>(p.zero_point == nullptr ? kQMinSymmetric : kQMinAsymmetric)) {}
  __device__ static float factor(float scale) { return inverse(scale); }
  __device__ Loaded load(int32_t offset) const { return load_raw<kVec>(x, offset, dtype); }
  template <typename Grid>
  __device__ void finish(int32_t offset, const Loaded& loaded, const Grid& grid) const {
    float values[kVec];
    to_floats(loaded, dtype, values);
    Vec<int8_t, kVec> out;
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) {
      out[i] = quantize_clamped(values[i], grid.factor(i), grid.zero_point(i), qmin);
    }
    store_vec(q + offset, out);
  }
};

template <int32_t kVecWidth>
struct DequantizeOp {
  using Params = DequantizeParams;
  static constexpr int32_t kVec = kVecWidth;
  using Loaded = Vec<int8_t, kVec>;

  DType dtype;
  const int8_t* q;
  void* x;

  __device__ DequantizeOp(const Params& p, int64_t token, int64_t column)
      : dtype(dtype_of_vectors<kVec>(p.x_dtype)),
        q(p.q + token * p.q_stride_token + column),
        x(advance(p.x, token * p.dim + column, dtype)) {}
  __device__ static float factor(float scale) { return scale; }
  __device__ Loaded load(int32_t offset) const { return load_vec<kVec>(q + offset); }
  template <typename Grid>
  __device__ void finish(int32_t offset, const Loaded& loaded, const Grid& grid) const {
    float values[kVec];
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) {
      values[i] = (static_cast<float>(loaded[i]) - grid.zero_point(i)) * grid.factor(i);
    }
    store_raw(x, offset, dtype, from_floats(values, dtype));
  }
};

// A block is blockDim.y rows of blockDim.x threads; a thread has kVectorsInFlight vectors of its row.
template <typename Op>
__global__ void __launch_bounds__(kQuantizeThreads)
    scale_rows_kernel(const __grid_constant__ typename Op::Params p) {
  const bool per_token = p.granularity == Granularity::kPerToken;
  const auto step = static_cast<int32_t>(blockDim.x) * Op::kVec;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kVectorsInFlight * step +
                         static_cast<int32_t>(threadIdx.x) * Op::kVec;
  const auto left = static_cast<int32_t>(min(p.dim - column, int64_t{kVectorsInFlight} * step));
  const int64_t token_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  int64_t token = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  for (; token < p.tokens; token += token_step) {
    const Op op(p, token, column);
    typename Op::Loaded loaded[kVectorsInFlight];
#pragma unroll
    for (int32_t v = 0; v < kVectorsInFlight; ++v) {
      if (v * step < left) loaded[v] = op.load(v * step);
    }
    const int64_t i = per_token ? token : 0;
    const float zero_point = p.zero_point == nullptr ? 0.0f : warp_load(p.zero_point + i);
    const SharedGrid grid{Op::factor(warp_load(p.scale + i)), zero_point};
#pragma unroll
    for (int32_t v = 0; v < kVectorsInFlight; ++v) {
      if (v * step < left) op.finish(v * step, loaded[v], grid);
    }
  }
}

// The part of a matrix that a block of warps walks down: 32 vectors of columns wide.
struct Tile {
  int64_t column;      // of this lane's vector
  int64_t token, end;  // of this warp's first token, of the block
  __device__ Tile(int64_t tokens, int64_t tokens_per_block, int32_t vec) {
    column = (static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x) * vec;
    const int64_t begin = blockIdx.y * tokens_per_block;
    token = begin + threadIdx.y;
    end = begin + tokens_per_block < tokens ? begin + tokens_per_block : tokens;
  }
  // Calls body(token of the first, how many up to kVectorsInFlight), warps taking turns at tokens.
  template <typename F>
  __device__ void walk(const F& body) const {
    constexpr int64_t kStep = kVectorsInFlight * kTileWarps;
    for (int64_t t = token; t < end; t += kStep) {
      const int64_t left = (end - t + kTileWarps - 1) / kTileWarps;
      body(t, left < kVectorsInFlight ? static_cast<int32_t>(left) : kVectorsInFlight);
    }
  }
};

// The scales of the block's columns are read and inverted once, through shared memory, and serve
// tokens_per_block tokens: 4 (or 8) bytes against 2 to 5 bytes a token.
template <typename Op>
__global__ void __launch_bounds__(kQuantizeThreads)
    scale_columns_kernel(const __grid_constant__ typename Op::Params p, int64_t tokens_per_block) {
  constexpr int32_t kVec = Op::kVec, kColumns = kVec * kWarpSize;
  __shared__ alignas(16) float factors[kColumns], zero_points[kColumns];
  const auto thread = static_cast<int32_t>(threadIdx.y * kWarpSize + threadIdx.x);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kColumns + thread;
  if (thread < kColumns && mine < p.dim) {
    factors[thread] = Op::factor(p.scale[mine]);
    zero_points[thread] = p.zero_point == nullptr ? 0.0f : static_cast<float>(p.zero_point[mine]);
  }
  __syncthreads();
  const Tile tile(p.tokens, tokens_per_block, kVec);
  if (tile.column >= p.dim) return;
  ChannelGrid<kVec> grid;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) {
    grid.factors[i] = factors[threadIdx.x * kVec + i];
    grid.zero_points[i] = zero_points[threadIdx.x * kVec + i];
  }
  tile.walk([&](int64_t token, int32_t count) {
    typename Op::Loaded loaded[kVectorsInFlight];
#pragma unroll
    for (int32_t v = 0; v < kVectorsInFlight; ++v) {
      if (v < count) loaded[v] = Op(p, token + v * kTileWarps, tile.column).load(0);
    }
#pragma unroll
    for (int32_t v = 0; v < kVectorsInFlight; ++v) {
      if (v < count) Op(p, token + v * kTileWarps, tile.column).finish(0, loaded[v], grid);
    }
  });
}

// Non-negative floats order like their bits; NaN is never an amax.
__device__ inline void atomic_max(float* address, float x) {
  atomicMax(reinterpret_cast<int32_t*>(address), __float_as_int(x));
}

// max|x| into scale_out, which holds zeros: into one element or one for each column.
template <int32_t kVec>
__global__ void __launch_bounds__(kQuantizeThreads)
    amax_kernel(const __grid_constant__ QuantizeParams p, int64_t tokens_per_block) {
  constexpr int32_t kColumns = kVec * kWarpSize;
  // Column lane * kVec + i of the tile is partial[warp][i * kPitch + lane]: neither the writes, lanes
  // along the row, nor the reads, threads along columns, meet a bank twice.
  constexpr int32_t kPitch = kWarpSize + kWarpSize / kVec;
  __shared__ float partial[kTileWarps][kVec * kPitch];
  const Tile tile(p.tokens, tokens_per_block, kVec);
  const DType dtype = dtype_of_vectors<kVec>(p.x_dtype);
  float amax[kVec] = {};
  // Lanes beyond the last column stay for the barrier.
  const bool has_columns = tile.column < p.dim;
  tile.walk([&](int64_t token, int32_t count) {
    RawVec<kVec> loaded[kVectorsInFlight];
#pragma unroll
    for (int32_t v = 0; v < kVectorsInFlight; ++v) {
      if (!has_columns || v >= count) continue;
      loaded[v] = QuantizeOp<kVec>(p, token + v * kTileWarps, tile.column).load(0);
    }
#pragma unroll
    for (int32_t v = 0; v < kVectorsInFlight; ++v) {
      if (!has_columns || v >= count) continue;
      float x[kVec];
      to_floats(loaded[v], dtype, x);
#pragma unroll
      for (int32_t i = 0; i < kVec; ++i) amax[i] = fmaxf(amax[i], fabsf(x[i]));
    }
  });
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) partial[threadIdx.y][i * kPitch + threadIdx.x] = amax[i];
  __syncthreads();
  const auto thread = static_cast<int32_t>(threadIdx.y * kWarpSize + threadIdx.x);
  if (thread >= kColumns) return;  // whole warps
  float tile_amax = 0.0f;
#pragma unroll
  for (int32_t warp = 0; warp < kTileWarps; ++warp) {
    tile_amax = fmaxf(tile_amax, partial[warp][thread % kVec * kPitch + thread / kVec]);
  }
  if (p.granularity == Granularity::kPerTensor) {
    tile_amax = warp_reduce<Max>(tile_amax);
    if (threadIdx.x == 0) atomic_max(p.scale_out, tile_amax);
    return;
  }
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + thread;
  if (column < p.dim) atomic_max(p.scale_out + column, tile_amax);
}

// Turns amax into a scale, in place.
__global__ void __launch_bounds__(kQuantizeThreads)
    scale_from_amax_kernel(float* scale, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x;
  if (i < count) scale[i] = scale_from_amax(scale[i]);
}

// A row for each group of threads (common/row.cuh).
template <typename Row>
__global__ void __launch_bounds__(kMaxTokenThreads, 1)
    quantize_tokens_kernel(const __grid_constant__ QuantizeParams p) {
  __shared__ float partials[RowGroup::kPartials];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.tokens) return;
  RowGroup group(partials);
  const QuantizeOp<Row::kVec> first(p, token, first_column<Row::kVec>());
  Row row(PlainSource{first.x, first.dtype}, p.dim);
  float amax = 0.0f;
  row.for_each_first([&](const auto& x, int64_t) { amax = fmaxf(amax, amax_of(x)); });
  const float scale = scale_from_amax(group.reduce<Max>(amax));
  const float inv_scale = inverse(scale);
  row.for_each(
      [&](const auto& x, int64_t offset) { store_symmetric(first.q + offset, x, inv_scale); });
  if (threadIdx.x == 0) p.scale_out[token] = scale;
}

}  // namespace mambaquant::cuda
