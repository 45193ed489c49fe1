// From a checked call to a kernel: hands over torch's thread pool and turns a Status into an exception.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "mambaquant/types.h"
#include "torch/checks.h"

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

// `cpu_launcher` is called as Status(const Threads&).
template <typename CpuLauncher>
void launch(OpName op, const CpuLauncher& cpu_launcher) {
  check_status(op, cpu_launcher(torch_threads()));
}

}  // namespace mambaquant::binding
