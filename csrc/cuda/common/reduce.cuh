// Reductions over a warp and over a block. Every thread gets the result; the order of additions
// depends on the block's size alone.
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

// `partial` holds a float for each warp of the block, kThreads / 32. Begins with a barrier, so that
// the same memory may serve again and again.
template <typename Op, int32_t kThreads>
__device__ inline float block_reduce(float x, float* partial) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024);
  constexpr int32_t kWarps = kThreads / kWarpSize;
  x = warp_reduce<Op>(x);
  if constexpr (kWarps > 1) {
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    __syncthreads();
    if (lane == 0) partial[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    x = warp_reduce<Op>(lane < kWarps ? partial[lane] : Op::identity());
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
