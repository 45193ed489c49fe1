// Reductions over a warp, in an order that depends on nothing, and what else a warp or some warps do together.
#pragma once

#include <cstdint>

namespace mambaquant::cuda {

inline constexpr int32_t kWarpSize = 32;
inline constexpr uint32_t kFullMask = 0xffffffffu;

struct Sum {
  static __device__ float identity() { return 0.0f; }
  static __device__ float apply(float a, float b) { return a + b; }
};
struct Max {  // of magnitudes: the identity is 0
  static __device__ float identity() { return 0.0f; }
  static __device__ float apply(float a, float b) { return fmaxf(a, b); }
};

template <typename Op, int32_t kWidth = kWarpSize>
__device__ inline float warp_reduce(float x) {
#pragma unroll
  for (int32_t offset = kWidth / 2; offset > 0; offset /= 2) {
    x = Op::apply(x, __shfl_xor_sync(kFullMask, x, offset));
  }
  return x;
}

// A value that a whole warp needs, asked for by one lane.
template <typename T>
__device__ inline float warp_load(const T* p) {
  T value{};
  if (threadIdx.x % kWarpSize == 0) value = *p;
  return static_cast<float>(__shfl_sync(kFullMask, value, 0));
}

// Waits for `threads` threads of the block that name the same barrier; 0 is __syncthreads's.
__device__ inline void named_barrier(int32_t barrier, int32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace mambaquant::cuda
