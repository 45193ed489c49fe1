// The epilogue of the convolutions (mambaquant/conv_epilogue.h), and words of neighbouring channels.
#pragma once

#include "cuda/common/bytes.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/quant.cuh"
#include "cuda/common/vec.cuh"
#include "mambaquant/conv_epilogue.h"

namespace mambaquant::cuda {

// kVec bytes of neighbouring channels, in a word.
template <int32_t kVec>
__device__ inline uint32_t load_bytes(const int8_t* p) {
  if constexpr (kVec == 4) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else {
    return *reinterpret_cast<const uint8_t*>(p);
  }
}
template <int32_t kVec>
__device__ inline void store_bytes(int8_t* p, uint32_t bytes) {
  if constexpr (kVec == 4) {
    *reinterpret_cast<uint32_t*>(p) = bytes;
  } else {
    *p = static_cast<int8_t>(bytes);
  }
}

// Of the channels of a block, as they lie in shared memory, and of a lane, in registers.
template <int32_t kCount>
struct alignas(16) ConvEpilogue {
  float scale[kCount], bias[kCount], inv_out_scale[kCount], zero_point[kCount];

  __device__ void read(const ConvEpilogueParams& p, int64_t channel, int32_t i) {
    scale[i] = p.x_scale[channel] * p.weight_scale[channel];
    bias[i] = p.bias == nullptr ? 0.0f : p.bias[channel];
    inv_out_scale[i] = inverse(p.out_scale[channel]);
    zero_point[i] =
        p.out_zero_point == nullptr ? 0.0f : static_cast<float>(p.out_zero_point[channel]);
  }

  // Those of kVec channels from `first` on.
  template <int32_t kVec>
  __device__ ConvEpilogue<kVec> take(int32_t first) const {
    ConvEpilogue<kVec> lane;
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) {
      lane.scale[i] = scale[first + i];
      lane.bias[i] = bias[first + i];
      lane.inv_out_scale[i] = inv_out_scale[first + i];
      lane.zero_point[i] = zero_point[first + i];
    }
    return lane;
  }

  // The kCount channels' q in a word. `sums` are acc + kRounderBits (NOTE(shifted-integers)), which take the place
  // of a conversion: |acc| < 2^22.
  __device__ uint32_t quantize(const int32_t (&sums)[kCount], float qmin) const {
    Vec<int8_t, kCount> q;
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) {
      const float acc = __int_as_float(sums[i]) - kRounder;
      const float y = silu(fmaf(acc, scale[i], bias[i]));
      q[i] = quantize_clamped(y, inv_out_scale[i], zero_point[i], qmin);
    }
    return load_bytes<kCount>(q.data);
  }
};

__device__ inline float conv_qmin(const ConvEpilogueParams& p) {
  return static_cast<float>(p.out_zero_point == nullptr ? kQMinSymmetric : kQMinAsymmetric);
}

}  // namespace mambaquant::cuda
