// Launchers of quantize and dequantize.
#include "cuda/common/launch.h"
#include "cuda/quantize_kernel.cuh"

namespace mambaquant::cuda {

namespace {

template <typename InputT, Granularity kGranularity>
Status launch_static(const QuantizeParams& p, Stream stream) {
  constexpr int32_t kVec = kVecWidth<InputT>;
  const bool fits = p.dim % kVec == 0 && is_aligned(p.x, p.x_stride_token * sizeof(InputT), 16) &&
                    is_aligned(p.q, p.dim, kVec);
  const int64_t vectors = p.tokens * p.dim / (fits ? kVec : 1);
  const auto blocks = static_cast<uint32_t>(ceil_div(vectors, kQuantizeThreads));
  if (fits) {
    quantize_kernel<InputT, kGranularity, kVec>
        <<<blocks, kQuantizeThreads, 0, to_cuda(stream)>>>(p);
  } else {
    quantize_kernel<InputT, kGranularity, 1><<<blocks, kQuantizeThreads, 0, to_cuda(stream)>>>(p);
  }
  return check_launch();
}

}  // namespace

Status quantize(const QuantizeParams& p, Stream stream) {
  if (p.scale == nullptr) return Status::unsupported("dynamic scales are not written yet");
  if (p.tokens == 0 || p.dim == 0) return Status::ok();
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    using InputT = device_type_of<decltype(tag)>;
    switch (p.granularity) {
      case Granularity::kPerTensor:
        return launch_static<InputT, Granularity::kPerTensor>(p, stream);
      case Granularity::kPerToken:
        return launch_static<InputT, Granularity::kPerToken>(p, stream);
      default:
        return launch_static<InputT, Granularity::kPerChannel>(p, stream);
    }
  });
}

Status dequantize(const DequantizeParams&, Stream) {
  return Status::unsupported("not written yet");
}

}  // namespace mambaquant::cuda
