// Launchers of hadamard_transform and hadamard_quantize: which shape serves which dim.
#include "mambaquant/hadamard.h"

#include <bit>
#include <cmath>

#include "cuda/common/launch.h"
#include "cuda/hadamard_kernel.cuh"

namespace mambaquant::cuda {

namespace {

template <typename... Shapes>
struct ShapeList {};

// kOrder, kExtraLog, kColumns, smallest and largest b, rounds, registers. The columns are as many as kValues allows;
// the last sizes of 28, 52 and 60 exceed the shared memory of a block and come in two rounds.
using AllShapes =
    ShapeList<HadamardShape<1, 0, 4, 0, 1>, HadamardShape<1, 2, 4, 0, 6>,
              HadamardShape<1, 4, 4, 5, 10>, HadamardShape<1, 5, 2, 10, 10, 2>,
              HadamardShape<12, 0, 4, 0, 10>, HadamardShape<12, 1, 2, 10, 10>,
              HadamardShape<20, 0, 2, 0, 7>, HadamardShape<20, 0, 4, 8, 10>,
              HadamardShape<28, 0, 2, 0, 9>, HadamardShape<28, 0, 2, 10, 10, 2>,
              HadamardShape<36, 0, 2, 0, 9>, HadamardShape<44, 0, 2, 0, 9, 1, 255>,
              HadamardShape<52, 0, 1, 0, 8>, HadamardShape<52, 0, 1, 9, 9, 2>,
              HadamardShape<60, 0, 1, 0, 8, 1, 255>, HadamardShape<60, 0, 1, 9, 9, 2>>;

template <typename Shape>
Status launch_shape(const HadamardParams& p, int32_t row_log, Stream stream) {
  const int32_t threads = Shape::threads(row_log);
  HadamardPlan plan;
  plan.row_log = row_log;
  plan.tokens_log =
      std::countr_zero(static_cast<uint32_t>(threads / Shape::threads_per_token(row_log)));
  plan.norm = 1.0f / std::sqrt(static_cast<float>(p.dim));
  plan.is_vector = is_aligned(p.x, p.x_stride_token * (p.x_dtype == DType::kF32 ? 4 : 2), 16);
  const int64_t blocks = ceil_div(p.tokens, int64_t{1} << plan.tokens_log);
  if (blocks > INT32_MAX) return Status::unsupported("expected fewer than 2^31 blocks of tokens");
  const int32_t shared = Shape::shared_bytes(row_log);
  const Status allowed = allow_shared_memory(hadamard_kernel<Shape>, shared);
  if (!allowed.is_ok()) return allowed;
  hadamard_kernel<Shape><<<static_cast<uint32_t>(blocks), static_cast<uint32_t>(threads),
                           static_cast<size_t>(shared), to_cuda(stream)>>>(p, plan);
  return check_launch();
}

Status launch_first(ShapeList<>, const HadamardParams&, Stream) {
  return Status::unsupported(
      "expected dim = m * 2^k, at most 32768, with m one of the base orders");
}
// By the first shape that p.dim fits.
template <typename Shape, typename... Others>
Status launch_first(ShapeList<Shape, Others...>, const HadamardParams& p, Stream stream) {
  const int64_t length = p.dim / Shape::kRows;
  const bool fits = p.base_order == Shape::kOrder && length * Shape::kRows == p.dim &&
                    length >= int64_t{1} << Shape::kMinLog &&
                    length <= int64_t{1} << Shape::kMaxLog &&
                    std::has_single_bit(static_cast<uint64_t>(length));
  if (!fits) return launch_first(ShapeList<Others...>{}, p, stream);
  return launch_shape<Shape>(p, std::countr_zero(static_cast<uint64_t>(length)), stream);
}

Status launch(const HadamardParams& p, const void* output, Stream stream) {
  if (p.tokens == 0) return Status::ok();
  if (!is_aligned(output, 0, 16))
    return Status::unsupported("expected an output at a multiple of 16 bytes");
  return launch_first(AllShapes{}, p, stream);
}

}  // namespace

Status hadamard_transform(const HadamardParams& p, Stream stream) { return launch(p, p.y, stream); }

Status hadamard_quantize(const HadamardParams& p, Stream stream) { return launch(p, p.q, stream); }

}  // namespace mambaquant::cuda
