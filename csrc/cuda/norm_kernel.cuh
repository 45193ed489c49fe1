// norm_quantize on the device. Formula: mambaquant/norm.h.
//
// Bound: bytes. A row is read once and written once: a group of threads holds it in registers, 16 or 24
// elements a thread, through the sums, max|y| and rounding (common/row.cuh). LayerNorm's variance is a
// second pass over the registers, so that a large mean cancels nothing. Without a residual an element
// moves 3 (float16) or 5 bytes (float32), with one up to 13.
//
// weight and bias, 4 bytes a column each, would cost as much again if each row fetched them: a block
// keeps them in shared memory and walks over many rows, its groups each at a row of their own.
//
// An element takes 5 instructions of rounding and packing, 1 to 3 of normalising, 1 (RMSNorm) or 3 of measuring, 1 of
// max|y| (which a static scale computes too, and drops), and 1 for converting 16 bits.
// Registers: at most 96 for 640 threads a block, 128 for the 512 threads that hold 24 elements.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/common/quant.cuh"
#include "cuda/common/row.cuh"
#include "mambaquant/norm.h"

namespace mambaquant::cuda {

template <typename Row>
inline constexpr int32_t kMaxNormThreads = Row::kValues > 16 ? 512 : 640;

// Elements of s = x or round(x + residual), which it stores.
struct NormSource {
  const void* x;
  const void* residual;  // or null
  void* out;
  DType x_dtype, residual_dtype;
  bool is_aligned;

  template <int32_t kVec>
  struct Fetched {
    RawVec<kVec> x, residual;
  };

  __device__ NormSource(const NormQuantizeParams& p, int64_t token, int64_t column, bool aligned)
      : x(advance(p.x, token * p.x_stride_token + column, p.x_dtype)),
        residual(nullptr),
        out(nullptr),
        x_dtype(p.x_dtype),
        residual_dtype(p.residual_dtype),
        is_aligned(aligned) {
    if (p.residual == nullptr) return;
    residual = advance(p.residual, token * p.residual_stride_token + column, residual_dtype);
    out = advance(p.residual_out, token * p.dim + column, residual_dtype);
  }

  template <int32_t kVec>
  __device__ Fetched<kVec> fetch(int64_t offset) const {
    Fetched<kVec> fetched;
    fetched.x = load_raw<kVec>(x, offset, x_dtype, is_aligned);
    if (residual != nullptr) {
      fetched.residual = load_raw<kVec>(residual, offset, residual_dtype, is_aligned);
    }
    return fetched;
  }
  template <int32_t kVec>
  __device__ void take(const Fetched<kVec>& fetched, int64_t offset, float (&s)[kVec]) const {
    to_floats(fetched.x, x_dtype, s);
    if (residual == nullptr) return;
    float addend[kVec];
    to_floats(fetched.residual, residual_dtype, addend);
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) s[i] += addend[i];
    store_rounded(out, offset, residual_dtype, s, is_aligned);
  }
  __device__ PlainSource stored() const {
    return residual == nullptr ? PlainSource{x, x_dtype, is_aligned}
                               : PlainSource{out, residual_dtype, is_aligned};
  }
};

// weight or bias, from the thread's first column on: a copy in shared memory, or where rows are too long
// for that, in global memory. The copy for vectors of 8 holds column c at
// 4 * ((c / 4 % 2) * (dim / 8) + c / 8) + c % 4: first halves of vectors, then second halves, so that lanes
// read neighbouring 16 bytes.
template <int32_t kVec, bool kIsCopy>
struct Parameter {
  static constexpr int32_t kPart = kVec == 1 ? 1 : 4;  // floats of one load
  static constexpr int32_t kParts = kVec / kPart;

  const float* first;
  int32_t half;     // floats between the halves of a vector of a copy
  bool is_aligned;  // that loads of kPart may be

  // With kIsCopy all threads of the block begin to copy to `shared`; wait_for_copies() must follow.
  __device__ Parameter(const float* global, int64_t dim, float* shared, bool aligned)
      : half(static_cast<int32_t>(dim / 2)), is_aligned(kIsCopy || aligned) {
    if constexpr (kIsCopy) {
      first = shared + first_column<kVec>() / kParts;
      if (global == nullptr) return;
      const auto thread = static_cast<int32_t>(threadIdx.y * blockDim.x + threadIdx.x);
      const auto threads = static_cast<int32_t>(blockDim.x * blockDim.y);
      for (int32_t i = thread; i < static_cast<int32_t>(dim) / kPart; i += threads) {
        const int32_t place = kVec == 8 ? i % 2 * half + i / 2 * kPart : i * kPart;
        copy_part(shared + place, global + i * kPart, aligned);
      }
    } else {
      first = global + first_column<kVec>();
    }
  }

  // f(i, value) for each element of the vector `offset` columns further.
  template <typename F>
  __device__ void for_each(int64_t offset, const F& f) const {
#pragma unroll
    for (int32_t part = 0; part < kParts; ++part) {
      const float* address = kIsCopy ? first + static_cast<int32_t>(offset) / kParts + part * half
                                     : first + offset + part * kPart;
      const auto values = load_vec<kPart>(address, is_aligned);
#pragma unroll
      for (int32_t i = 0; i < kPart; ++i) f(part * kPart + i, values[i]);
    }
  }

 private:
  __device__ static void copy_part(float* shared, const float* global, bool aligned) {
    if (aligned) return __pipeline_memcpy_async(shared, global, kPart * sizeof(float));
#pragma unroll
    for (int32_t i = 0; i < kPart; ++i) {
      __pipeline_memcpy_async(shared + i, global + i, sizeof(float));
    }
  }
};

__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}

// y of a row, and what it takes to compute it.
template <typename Row, bool kSubtractMean>
struct Normalization {
  static constexpr int32_t kVec = Row::kVec;

  Parameter<kVec, Row::kInRegisters> weight, bias;
  bool has_weight, has_bias;
  float mean = 0.0f, rstd = 0.0f;

  __device__ Normalization(const NormQuantizeParams& p, float* shared, bool is_aligned)
      : weight(p.weight, p.dim, shared, is_aligned),
        bias(p.bias, p.dim, shared + (p.weight == nullptr ? 0 : p.dim), is_aligned),
        has_weight(p.weight != nullptr),
        has_bias(kSubtractMean && p.bias != nullptr) {}

  __device__ void subtract(float (&s)[kVec]) const {
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) s[i] -= mean;
  }
  // y from s, or from s - mean where kSubtractMean.
  __device__ void scale_and_shift(float (&y)[kVec], int64_t offset) const {
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) y[i] *= rstd;
    if (has_weight) weight.for_each(offset, [&](int32_t i, float w) { y[i] *= w; });
    if (has_bias) bias.for_each(offset, [&](int32_t i, float b) { y[i] += b; });
  }
  // The same for a row in memory, where nothing is left of the pass that measured it.
  __device__ void apply_again(float (&s)[kVec], int64_t offset) const {
    if constexpr (kSubtractMean) subtract(s);
    scale_and_shift(s, offset);
  }
};

__device__ inline float rstd_of(float sum_of_squares, const NormQuantizeParams& p) {
  const float mean_square = __fdiv_rn(sum_of_squares, static_cast<float>(p.dim));
  return __frcp_rn(__fsqrt_rn(mean_square + p.eps));
}

template <int32_t kVec>
__device__ inline float sum_of(const float (&s)[kVec]) {
  float sum = 0.0f;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) sum += s[i];
  return sum;
}
template <int32_t kVec>
__device__ inline float sum_of_squares(const float (&s)[kVec]) {
  float sum = 0.0f;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) sum = fmaf(s[i], s[i], sum);
  return sum;
}

// Sets mean and rstd. Registers hold s - mean afterwards, or s without a mean.
template <typename Row, bool kSubtractMean>
__device__ inline void measure(const NormQuantizeParams& p, RowGroup& group, Row& row,
                               Normalization<Row, kSubtractMean>& norm) {
  float sum = 0.0f;
  if constexpr (kSubtractMean) {
    row.for_each_first([&](auto& s, int64_t) { sum += sum_of(s); });
    norm.mean = __fdiv_rn(group.reduce<Sum>(sum), static_cast<float>(p.dim));
    sum = 0.0f;
    row.for_each([&](auto& s, int64_t) {
      norm.subtract(s);
      sum += sum_of_squares(s);
    });
  } else {
    row.for_each_first([&](auto& s, int64_t) { sum += sum_of_squares(s); });
  }
  norm.rstd = rstd_of(group.reduce<Sum>(sum), p);
}

// Puts y into the registers of a row and returns max|y| of the thread.
template <typename Row, bool kSubtractMean>
__device__ inline float normalize(Row& row, const Normalization<Row, kSubtractMean>& norm) {
  float amax = 0.0f;
  row.for_each([&](auto& s, int64_t offset) {
    if constexpr (Row::kInRegisters) {
      norm.scale_and_shift(s, offset);
    } else {
      norm.apply_again(s, offset);
    }
    amax = fmaxf(amax, amax_of(s));
  });
  return amax;
}

// Block (threads of a row, rows at a time); blocks walk over the rows with the grid's stride. Where vectors are not
// aligned a thread takes the same elements one by one, so that the sums keep their order and every layout of x gives
// the same bits.
template <typename Row, bool kSubtractMean>
__global__ void __launch_bounds__(kMaxNormThreads<Row>, 1)
    norm_quantize_kernel(const __grid_constant__ NormQuantizeParams p, bool may_use_vectors) {
  constexpr int32_t kVec = Row::kVec;
  extern __shared__ float4 shared[];
  __shared__ float partials[RowGroup::kPartials];
  __shared__ float static_inv_scale;
  const bool is_aligned = kVec == 1 || Row::kIsFull || may_use_vectors;
  Normalization<Row, kSubtractMean> norm(p, reinterpret_cast<float*>(shared), is_aligned);
  RowGroup group(partials);
  const bool is_dynamic = p.scale == nullptr;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    static_inv_scale = is_dynamic ? 0.0f : inverse(*p.scale);
  }
  wait_for_copies();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (; token < p.tokens; token += step) {
    Row row(NormSource(p, token, first_column<kVec>(), is_aligned), p.dim);
    measure(p, group, row, norm);
    float amax = 0.0f;
    if (Row::kInRegisters || is_dynamic) amax = normalize(row, norm);
    float inv_scale = static_inv_scale;
    if (is_dynamic) {
      const float scale = scale_from_amax(group.reduce<Max>(amax));
      inv_scale = inverse(scale);
      if (threadIdx.x == 0) p.scale_out[token] = scale;
    }
    int8_t* q = p.q + token * p.dim + first_column<kVec>();
    row.for_each([&](auto& y, int64_t offset) {
      if constexpr (!Row::kInRegisters) norm.apply_again(y, offset);
      store_symmetric(q + offset, y, inv_scale, is_aligned);
    });
  }
}

}  // namespace mambaquant::cuda
