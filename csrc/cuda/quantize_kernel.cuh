// quantize, dequantize on the device.
//
// Bound: bytes. A thread moves one vector: 16 bytes of the wider side, neighbouring threads
// neighbouring vectors, so that every request is whole sectors; each element is read once and written
// once. Rows whose width or start does not fit a vector are moved element by element (kVec = 1).
#pragma once

#include "cuda/common/quant.cuh"
#include "cuda/common/vec.cuh"
#include "mambaquant/quantize.h"

namespace mambaquant::cuda {

inline constexpr int32_t kQuantizeThreads = 256;

// Where a thread's vector lies; columns count vectors.
struct VectorPlace {
  int64_t token;
  int64_t column;
};

template <int32_t kVec>
__device__ inline bool find_vector(int64_t tokens, int64_t dim, VectorPlace* place) {
  const int64_t columns = dim / kVec;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x;
  if (index >= tokens * columns) return false;
  place->token = index / columns;
  place->column = index % columns * kVec;
  return true;
}

template <typename InputT, Granularity kGranularity, int32_t kVec>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_kernel(const __grid_constant__ QuantizeParams p) {
  VectorPlace place;
  if (!find_vector<kVec>(p.tokens, p.dim, &place)) return;
  const InputT* x = static_cast<const InputT*>(p.x) + place.token * p.x_stride_token + place.column;
  const Vec<InputT, kVec> in = load_vec<kVec>(x);
  Vec<int8_t, kVec> out;
  const float qmin = static_cast<float>(p.zero_point == nullptr ? kQMinSymmetric : kQMinAsymmetric);
  const int64_t first = kGranularity == Granularity::kPerTensor  ? 0
                        : kGranularity == Granularity::kPerToken ? place.token
                                                                 : place.column;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) {
    const int64_t c = kGranularity == Granularity::kPerChannel ? first + i : first;
    const float zero_point = p.zero_point == nullptr ? 0.0f : static_cast<float>(p.zero_point[c]);
    out[i] = quantize_clamped(to_float(in[i]), inverse(p.scale[c]), zero_point, qmin);
  }
  store_vec(p.q + place.token * p.dim + place.column, out);
}

}  // namespace mambaquant::cuda
