// Runs CUDA launchers on CPU tensors in third_party/cudasim. Device and host share one address space there:
// a kernel may touch exactly the memory of the call's tensors, which is registered for the call.
#include <cuda_runtime_api.h>
#include <cudasim.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "torch/backend.h"
#include "torch/simulator.h"

namespace mambaquant::binding {
namespace {

std::atomic<bool>& simulating() {
  static std::atomic<bool> on{false};
  return on;
}

struct Range {
  const char* begin;
  const char* end;
};

// From the first to the last element that a tensor's strides reach.
Range range_of(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

class RegisteredMemory {
 public:
  explicit RegisteredMemory(const Buffers& buffers) {
    for (const Tensor* tensor : buffers) {
      if (tensor->numel() == 0) continue;
      const Range range = range_of(*tensor);
      cudasim_register_host(range.begin, static_cast<size_t>(range.end - range.begin));
      ranges_.push_back(range);
    }
  }
  ~RegisteredMemory() {
    for (const Range& range : ranges_) cudasim_unregister_host(range.begin);
  }
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

 private:
  std::vector<Range> ranges_;
};

}  // namespace

void set_simulating(bool on) { simulating() = on; }
bool is_simulating() { return simulating(); }

void set_simulated_device(const std::string& name) {
  if (cudasim_set_device(name.c_str()) != 0) {
    throw std::invalid_argument(
        "set_simulated_device: expected a100, rtx3090, l40s or h100, got '" + name + "'");
  }
}

void set_simulator_checks(const std::string& spec) {
  if (cudasim_set_checks(spec.c_str()) != 0) {
    throw std::invalid_argument("set_simulator_checks: cannot read '" + spec + "'");
  }
}

std::string simulator_stats() { return cudasim_stats_json(); }
void reset_simulator_stats() { cudasim_reset_stats(); }

void launch_on_cuda(OpName op, const Buffers& buffers, c10::function_ref<Status(Stream)> launcher) {
  const RegisteredMemory memory(buffers);
  const Status status = launcher(Stream{});
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    const std::string report = cudasim_last_report();
    cudaDeviceReset();
    TORCH_CHECK(false, op.name, ": ", cudaGetErrorString(error), "\n", report);
  }
  check_status(op, status);
}

}  // namespace mambaquant::binding
