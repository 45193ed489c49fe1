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

template <int32_t kColumns>
__device__ inline void store_quantized(const float* v, float factor, int8_t* out) {
  uint32_t q[kColumns];
#pragma unroll
  for (int32_t c = 0; c < kColumns; ++c) q[c] = quantize_symmetric_bits(v[c], factor);
  if constexpr (kColumns == 4) {
    const uint32_t low = __byte_perm(q[0], q[1], 0x0040), high = __byte_perm(q[2], q[3], 0x0040);
    *reinterpret_cast<uint32_t*>(out) = __byte_perm(low, high, 0x5410);
  } else if constexpr (kColumns == 2) {
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(__byte_perm(q[0], q[1], 0x0040));
  } else {
    *out = static_cast<int8_t>(q[0]);
  }
}

// v[c] * factor as OutputT: kWords words of one or two results each.
template <typename OutputT, int32_t kWords>
__device__ inline void scaled_words(const float* v, float factor, uint32_t* words) {
#pragma unroll
  for (int32_t i = 0; i < kWords; ++i) {
    if constexpr (std::is_same_v<OutputT, float>) {
      words[i] = __float_as_uint(__fmul_rn(v[i], factor));
    } else {
      const float a = __fmul_rn(v[2 * i], factor), b = __fmul_rn(v[2 * i + 1], factor);
      if constexpr (std::is_same_v<OutputT, __half>) {
        const __half2 pair = __floats2half2_rn(a, b);
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
  }
}

enum class Target { kGlobal, kShared };

// A row of a thread's results. To global memory by the intrinsic, which is one instruction: the compiler
// takes apart most of a run of vector stores there.
template <int32_t kColumns, Target kTarget, typename OutputT>
__device__ inline void store_scaled(const float* v, float factor, OutputT* out) {
  constexpr int32_t kWords = kColumns * static_cast<int32_t>(sizeof(OutputT)) / 4;
  if constexpr (sizeof(OutputT) == 1) {
    store_quantized<kColumns>(v, factor, out);
  } else if constexpr (kWords == 0) {
    *out = from_float<OutputT>(__fmul_rn(*v, factor));
  } else {
    Vec<uint32_t, kWords> words;
    scaled_words<OutputT, kWords>(v, factor, words.data);
    auto* destination = reinterpret_cast<uint32_t*>(out);
    if constexpr (kTarget == Target::kGlobal && kWords == 4) {
      __stwb(reinterpret_cast<uint4*>(out), make_uint4(words[0], words[1], words[2], words[3]));
    } else if constexpr (kTarget == Target::kGlobal && kWords == 2) {
      __stwb(reinterpret_cast<uint2*>(out), make_uint2(words[0], words[1]));
    } else {
      store_vec(destination, words);
    }
  }
}

// To global memory. A warp's store covers whole sectors where a row has 32 bytes.
template <typename Shape, typename OutputT>
__device__ inline void store_columns(const float* acc, float factor, int32_t row_log,
                                     OutputT* out) {
#pragma unroll
  for (int32_t row = 0; row < Shape::kRows; ++row) {
    store_scaled<Shape::kColumns, Target::kGlobal>(acc + row * Shape::kColumns, factor, out);
    out += 1 << row_log;  // step by step: kRows addresses would not fit in registers
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
  StagedT* first[4];
#pragma unroll
  for (int32_t k = 0; k < 4; ++k) {
    first[k] = tile + (place.token * Shape::kRows + (k ^ mix) << row_log) + place.column;
  }
#pragma unroll
  for (int32_t row = 0; row < Shape::kRows; ++row) {
    const float* v = acc + row * Shape::kColumns;
    StagedT* destination = first[row % 4];
    first[row % 4] += 4 << row_log;
    if (!Shape::is_tiny(row_log)) {
      store_scaled<Shape::kColumns, Target::kShared>(v, factor, destination);
    } else {
      for (int32_t c = 0; c < Shape::kColumns && c >> row_log == 0; ++c)
        store_scaled<1, Target::kShared>(v + c, factor, destination + c);
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

// One lane of the warp loads it.
__device__ inline float load_once(const float* x) {
  return __shfl_sync(kFullMask, threadIdx.x % kWarpSize == 0 ? *x : 0.0f, 0);
}

// 1 / sqrt(dim) and 1 / scale as one factor.
template <typename Shape>
__device__ inline float quantize_factor(const HadamardParams& p, float norm, int64_t token,
                                        const float* acc, const ColumnPlace<Shape>& place,
                                        int32_t row_log, float* partial) {
  if (p.scale != nullptr) return __fmul_rn(norm, inverse(load_once(p.scale)));
  float amax = 0.0f;
#pragma unroll
  for (int32_t i = 0; i < Shape::kValues; ++i) amax = fmaxf(amax, fabsf(acc[i]));
  amax = token_amax(amax, Shape::threads_per_token(row_log), partial);
  const float scale = scale_from_amax(__fmul_rn(amax, norm));
  if ((Shape::one_token() || token < p.tokens) && place.column == 0) p.scale_out[token] = scale;
  return __fmul_rn(norm, inverse(scale));
}

}  // namespace mambaquant::cuda
