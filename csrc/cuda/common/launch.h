// From a launcher to the device: launch, launch check, and what the current device is. Host code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "mambaquant/types.h"

namespace mambaquant::cuda {

inline cudaStream_t to_cuda(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

// Takes the error along, so that the check after a later launch does not report it as that launch's.
inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return Status::ok();
  static_cast<void>(cudaGetLastError());
  return Status::failed(cudaGetErrorString(error));
}

// Right after a launch: an error of the launch itself, not of what the kernel does later.
inline Status check_launch() { return to_status(cudaGetLastError()); }

// An attribute of the current device; 0 where the runtime does not know it.
inline int32_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}
inline int32_t multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// 80 for compute capability 8.0.
inline int32_t compute_capability() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Shared memory beyond 48 KiB, 8 of them left for what a kernel declares, must be asked for, once per
// kernel and device; asking again is cheap and needs no state of ours. What is asked for is always all that the
// device has beside `declared` bytes: the limit belongs to the kernel, and a thread of the host that asked for
// less would take it from under another's launch.
template <typename Kernel>
Status allow_shared_memory(Kernel kernel, int64_t bytes, int64_t declared = 0) {
  if (bytes <= 40 * 1024) return Status::ok();
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - declared;
  if (bytes > most) return Status::unsupported("expected a device with more shared memory a block");
  return to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(most)));
}

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Whether a vector access of `bytes` may start at every row of a matrix.
inline bool is_aligned(const void* pointer, int64_t row_stride_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0 &&
         row_stride_bytes % bytes == 0;
}

}  // namespace mambaquant::cuda
