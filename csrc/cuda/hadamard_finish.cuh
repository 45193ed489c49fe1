// The end of the Hadamard kernel: the scale, and a thread's columns to global memory.
#pragma once

#include <type_traits>

#include "cuda/common/quant.cuh"
#include "cuda/hadamard_columns.cuh"

namespace mambaquant::cuda {

// Largest magnitude of a token, from those of its threads: a power of two of them, which either share a
// warp with none but their like or fill the block. `partial` holds kReduceFloats.
__device__ inline float token_amax(float amax, int32_t threads_per_token, float* partial) {
#pragma unroll 1
  for (int32_t mask = 1; mask < threads_per_token && mask < kWarpSize; mask *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, mask));
  }
  if (threads_per_token <= kWarpSize) return amax;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
  if (lane == 0) partial[threadIdx.x / kWarpSize] = amax;
  __syncthreads();
  return warp_reduce<Max>(lane < static_cast<int32_t>(blockDim.x) / kWarpSize ? partial[lane]
                                                                              : 0.0f);
}

// Vectors of kColumns results.
template <typename Shape, typename OutputT>
__device__ inline Vec<OutputT, Shape::kColumns> scaled(const float* v, float factor) {
  Vec<OutputT, Shape::kColumns> out;
#pragma unroll
  for (int32_t c = 0; c < Shape::kColumns; ++c) {
    if constexpr (sizeof(OutputT) == 1) {
      out[c] = quantize_symmetric(v[c], factor);
    } else {
      out[c] = from_float<OutputT>(__fmul_rn(v[c], factor));
    }
  }
  return out;
}

// To global memory. A warp's store covers whole sectors where a row has 32 bytes.
template <typename Shape, typename OutputT>
__device__ inline void store_columns(const float* acc, float factor, int32_t row_log,
                                     OutputT* out) {
#pragma unroll
  for (int32_t row = 0; row < Shape::kRows; ++row) {
    store_vec(out + (row << row_log), scaled<Shape, OutputT>(acc + row * Shape::kColumns, factor));
  }
}

// Shorter rows go through the tile, as int8 or float, so that the block's tokens leave as one run of
// bytes. Rows keep their order but for the four of a group, as in NOTE(short-rows).
template <typename OutputT>
__device__ inline int32_t staged_row_mix(int32_t token, int32_t row_log) {
  const int32_t bytes_log = row_log + (sizeof(OutputT) == 1 ? 0 : 2);
  if (bytes_log < 2) return bytes_log == 1 ? token >> 3 & 2 : 0;
  return token >> (bytes_log < 5 ? 5 - bytes_log : 0) & 3;
}

template <typename Shape, typename StagedT>
__device__ inline void stage_columns(const float* acc, float factor, int32_t row_log,
                                     const ColumnPlace<Shape>& place, StagedT* tile) {
  const int32_t mix = Shape::kRows == 1 ? 0 : staged_row_mix<StagedT>(place.token, row_log);
  StagedT* first = tile + (place.token * Shape::kRows << row_log) + place.column;
#pragma unroll
  for (int32_t row = 0; row < Shape::kRows; ++row) {
    const auto out = scaled<Shape, StagedT>(acc + row * Shape::kColumns, factor);
    StagedT* destination = first + ((row & ~3) << row_log) + (((row & 3) ^ mix) << row_log);
    if (row_log >= Shape::kColumnsLog) {
      store_vec(destination, out);
    } else {
      for (int32_t c = 0; c < Shape::kColumns && c >> row_log == 0; ++c) destination[c] = out[c];
    }
  }
}

// Where element `element` of the block's tokens was staged.
template <typename Shape, typename StagedT>
__device__ inline int32_t staged_position(int32_t element, int32_t row_log) {
  if constexpr (Shape::kRows == 1) return element;
  const int32_t token = (element >> row_log) / Shape::kRows;
  return element ^ (staged_row_mix<StagedT>(token, row_log) << row_log);
}

template <typename OutputT, typename StagedT>
__device__ inline OutputT from_staged(StagedT x) {
  if constexpr (sizeof(StagedT) == 1) {
    return x;
  } else {
    return from_float<OutputT>(x);
  }
}

// `count` neighbouring elements of the output from the tile.
template <typename Shape, typename StagedT, typename OutputT>
__device__ inline void copy_staged(const StagedT* tile, int32_t count, int32_t row_log,
                                   OutputT* out) {
  constexpr int32_t kVec = sizeof(StagedT) == 1 ? 4 : 1;
  for (int32_t i = threadIdx.x * kVec; i + kVec <= count; i += blockDim.x * kVec) {
    const auto in = load_vec<kVec>(tile + staged_position<Shape, StagedT>(i, row_log));
    Vec<OutputT, kVec> result;
#pragma unroll
    for (int32_t c = 0; c < kVec; ++c) result[c] = from_staged<OutputT>(in[c]);
    store_vec(out + i, result);
  }
  const int32_t rest = count / kVec * kVec + static_cast<int32_t>(threadIdx.x);
  if (rest < count) out[rest] = from_staged<OutputT>(tile[rest]);
}

// Columns of every token to `out`, the block's first element there: int8, or x's dtype.
template <typename Shape, typename OutputT>
__device__ inline void store_tokens(const float* acc, float factor, int32_t count, int32_t row_log,
                                    const ColumnPlace<Shape>& place, float* tile, OutputT* out) {
  using StagedT = std::conditional_t<sizeof(OutputT) == 1, int8_t, float>;
  if (row_log >= 5) {
    if (place.token >= count) return;
    const int64_t first = place.token * (int64_t{Shape::kRows} << row_log) + place.column;
    return store_columns<Shape>(acc, factor, row_log, out + first);
  }
  if constexpr (Shape::kMinLog < 5) {
    auto* staged = reinterpret_cast<StagedT*>(tile);
    __syncthreads();  // every thread has its columns
    stage_columns<Shape>(acc, factor, row_log, place, staged);
    __syncthreads();
    copy_staged<Shape>(staged, count * Shape::kRows << row_log, row_log, out);
  }
}

// 1 / sqrt(dim) and 1 / scale as one factor.
template <typename Shape>
__device__ inline float quantize_factor(const HadamardParams& p, float norm, int64_t token,
                                        const float* acc, const ColumnPlace<Shape>& place,
                                        int32_t row_log, float* partial) {
  if (p.scale != nullptr) return __fmul_rn(norm, inverse(*p.scale));
  float amax = 0.0f;
#pragma unroll
  for (int32_t i = 0; i < Shape::kValues; ++i) amax = fmaxf(amax, fabsf(acc[i]));
  amax = token_amax(amax, Shape::threads_per_token(row_log), partial);
  const float scale = scale_from_amax(__fmul_rn(amax, norm));
  if (token < p.tokens && place.column == 0) p.scale_out[token] = scale;
  return __fmul_rn(norm, inverse(scale));
}

}  // namespace mambaquant::cuda
