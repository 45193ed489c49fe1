// Launcher of depthwise_conv2d_quantize.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/conv2d_kernel.cuh"

namespace mambaquant::cuda {

namespace {

using Params = DepthwiseConv2dQuantizeParams;

// Rows that a warp walks: enough to pay for those above them, few enough that large work still comes in more blocks
// than there are multiprocessors.
constexpr int64_t kMinRows = 4;
constexpr int64_t kMaxRows = 64;
// A row is some thousand instructions of its warp and some hundred cycles of waiting: two warps a scheduler suffice.
constexpr int64_t kWarpsToFill = 8;

bool fits(const Params& p, int64_t vec) {
  return p.dim % vec == 0 && is_aligned(p.x, p.x_stride_column, vec) && p.x_stride_row % vec == 0 &&
         p.x_stride_batch % vec == 0 && is_aligned(p.q, 0, vec);
}

// Cuts the images so that every multiprocessor gets its blocks, if there is so much work.
template <typename Shape>
Conv2dPlan make_plan(const Params& p, int64_t tiles) {
  const int64_t warps = std::max<int64_t>(multiprocessor_count(), 1) * kWarpsToFill;
  Conv2dPlan plan;
  plan.strips = ceil_div(p.out_width(), Shape::kStrip);
  const int64_t rows = p.batch * plan.strips * tiles * p.out_height() / warps;
  plan.chunks = ceil_div(p.out_height(), std::clamp(rows, kMinRows, kMaxRows));
  plan.rows_per_chunk = ceil_div(p.out_height(), plan.chunks);
  plan.pieces = p.batch * plan.strips * plan.chunks;
  return plan;
}

template <typename Shape, int32_t kVec>
Status launch(const Params& p, Stream stream) {
  const int64_t tiles = ceil_div(p.dim, kVec * kWarpSize);
  const Conv2dPlan plan = make_plan<Shape>(p, tiles);
  const dim3 grid(static_cast<uint32_t>(ceil_div(plan.pieces, Shape::kWarps)),
                  static_cast<uint32_t>(tiles));
  const dim3 block(kWarpSize, Shape::kWarps);
  conv2d_kernel<Shape, kVec><<<grid, block, 0, to_cuda(stream)>>>(p, plan);
  return check_launch();
}

template <int32_t kSize>
Status launch(const Params& p, Stream stream) {
  using Dense = Conv2dShape<kSize, 1>;
  using Strided = Conv2dShape<kSize, 2>;
  if (fits(p, 4)) {
    return p.stride == 1 ? launch<Dense, 4>(p, stream) : launch<Strided, 4>(p, stream);
  }
  return p.stride == 1 ? launch<Dense, 1>(p, stream) : launch<Strided, 1>(p, stream);
}

}  // namespace

Status depthwise_conv2d_quantize(const Params& p, Stream stream) {
  if (!is_conv2d_kernel_size(p.kernel_height) || !is_conv2d_kernel_size(p.kernel_width)) {
    return Status::unsupported("expected a weight of odd height and width from 1 to 7");
  }
  if (p.stride != 1 && p.stride != 2) return Status::unsupported("expected stride 1 or 2");
  if (p.batch * p.height * p.width * p.dim == 0) return Status::ok();
  const int64_t size = std::max(p.kernel_height, p.kernel_width);
  if (size <= 3) return launch<3>(p, stream);
  return size == 5 ? launch<5>(p, stream) : launch<7>(p, stream);
}

}  // namespace mambaquant::cuda
