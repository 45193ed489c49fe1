// From a checked call to a kernel: picks the backend of the tensors, hands over torch's thread pool or the
// current stream, and turns a Status into an exception.
//
// A build has one of three ways to run the CUDA launchers:
//   MBQ_WITH_CUDA        CUDA tensors, on their device and its current stream (backend_cuda.cpp)
//   MBQ_WITH_SIMULATOR   CPU tensors, while simulation is switched on, in third_party/cudasim
//                        (backend_simulator.cpp)
//   neither              CPU kernels alone; nothing refers to the CUDA launchers then
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include "mambaquant/types.h"
#include "torch/checks.h"
#ifdef MBQ_WITH_SIMULATOR
#include "torch/simulator.h"
#endif

namespace mambaquant::binding {

inline Threads torch_threads() {
  Threads threads;
  threads.num_threads = at::get_num_threads();
  threads.run = [](void*, int64_t count, int64_t grain, Threads::Body body, const void* data) {
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(data, begin, end); });
  };
  return threads;
}

inline void check_status(OpName op, const Status& status) {
  if (status.is_ok()) return;
  TORCH_CHECK_NOT_IMPLEMENTED(status.code != Status::Code::kUnsupported, op.name, ": ",
                              status.message);
  TORCH_CHECK(false, op.name, ": ", status.message);
}

// Every tensor that a call reads or writes, the one whose device decides first.
using Buffers = c10::SmallVector<const Tensor*, 24>;

inline void add_buffer(Buffers& buffers, const Tensor& tensor) { buffers.push_back(&tensor); }
inline void add_buffer(Buffers& buffers, const OptionalTensor& tensor) {
  if (tensor.has_value()) buffers.push_back(&*tensor);
}
template <typename... Tensors>
Buffers buffers_of(const Tensors&... tensors) {
  Buffers buffers;
  (add_buffer(buffers, tensors), ...);
  return buffers;
}

#if defined(MBQ_WITH_CUDA)
inline constexpr bool kHasCuda = true;
inline bool runs_on_cuda(const Tensor& x) { return x.is_cuda(); }
#elif defined(MBQ_WITH_SIMULATOR)
inline constexpr bool kHasCuda = true;
inline bool runs_on_cuda(const Tensor&) { return is_simulating(); }
#else
inline constexpr bool kHasCuda = false;
inline constexpr bool runs_on_cuda(const Tensor&) { return false; }
#endif

// What `cpu` or `cuda` returns, by where the kernels for x run; `cuda` is called with x's device current.
template <typename Cpu, typename Cuda>
auto by_backend(const Tensor& x, const Cpu& cpu, const Cuda& cuda) {
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      const c10::DeviceGuard guard(x.device());
      return cuda();
    }
  }
  return cpu();
}

// Makes the tensors' device current, calls `launcher` with its current stream, and goes back.
void launch_on_cuda(OpName op, const Buffers& buffers, c10::function_ref<Status(Stream)> launcher);

// `cpu_launcher` is called as Status(const Threads&), `cuda_launcher` as Status(Stream).
template <typename CpuLauncher, typename CudaLauncher>
void launch(OpName op, const Buffers& buffers, const CpuLauncher& cpu_launcher,
            const CudaLauncher& cuda_launcher) {
  if constexpr (kHasCuda) {
    if (runs_on_cuda(*buffers.front())) return launch_on_cuda(op, buffers, cuda_launcher);
  }
  check_status(op, cpu_launcher(torch_threads()));
}

}  // namespace mambaquant::binding

// Registers what `function(torch::Library&)` implements, for each device of the build.
#if defined(MBQ_WITH_CUDA)
#define MBQ_REGISTER(function)                            \
  TORCH_LIBRARY_IMPL(mambaquant, CPU, m) { function(m); } \
  TORCH_LIBRARY_IMPL(mambaquant, CUDA, m) { function(m); }
#else
#define MBQ_REGISTER(function) \
  TORCH_LIBRARY_IMPL(mambaquant, CPU, m) { function(m); }
#endif
