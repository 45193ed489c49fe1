// Hand-over of data between the blocks of one launch, through flags in global memory.
#pragma once

#include <cstdint>

namespace mambaquant::cuda {

// Writes before a release are seen by whoever reads the flag by an acquire.
__device__ inline void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ inline uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

}  // namespace mambaquant::cuda
