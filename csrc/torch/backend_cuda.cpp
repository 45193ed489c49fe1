// Runs CUDA launchers on the device of their tensors. The one file that knows torch's CUDA library.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/backend.h"

namespace mambaquant::binding {

void launch_on_cuda(OpName op, const Buffers& buffers, c10::function_ref<Status(Stream)> launcher) {
  const c10::cuda::CUDAGuard guard(buffers.front()->device());
  check_status(op, launcher(Stream{c10::cuda::getCurrentCUDAStream().stream()}));
}

}  // namespace mambaquant::binding
