// Launcher of norm_quantize.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/norm_kernel.cuh"

namespace mambaquant::cuda {

namespace {

// Elements of a vector: 16 bytes of the widest of x and residual where they divide a row, or one. It decides the
// order of the sums, and therefore not by addresses.
int64_t vector_width(const NormQuantizeParams& p) {
  const bool has_float32 =
      p.x_dtype == DType::kF32 || (p.residual != nullptr && p.residual_dtype == DType::kF32);
  if (!has_float32 && p.dim % 8 == 0) return 8;
  return p.dim % 4 == 0 ? 4 : 1;
}

// Whether vectors of so many elements may be loaded and stored as such.
bool vectors_fit(const NormQuantizeParams& p, int64_t vec) {
  const int64_t x_size = element_size(p.x_dtype), residual_size = element_size(p.residual_dtype);
  const bool residual_fits =
      p.residual == nullptr ||
      (is_aligned(p.residual, p.residual_stride_token * residual_size, vec * residual_size) &&
       is_aligned(p.residual_out, p.dim * residual_size, vec * residual_size));
  return is_aligned(p.x, p.x_stride_token * x_size, vec * x_size) && is_aligned(p.q, p.dim, vec) &&
         is_aligned(p.weight, 0, 16) && is_aligned(p.bias, 0, 16) && residual_fits;
}

int64_t bytes_per_token(const NormQuantizeParams& p) {
  const int64_t residual = p.residual == nullptr ? 0 : 2 * element_size(p.residual_dtype);
  return p.dim * (element_size(p.x_dtype) + residual + 1);
}
int64_t parameter_bytes(const NormQuantizeParams& p) {
  return p.dim * 4 * ((p.weight != nullptr ? 1 : 0) + (p.bias != nullptr ? 1 : 0));
}

// A block a multiprocessor, which fills it. For RMSNorm fewer where the copies of weight would be more than a
// twentieth of all bytes, down to two thirds, which can still draw all of an A100's bandwidth: float16 is 4.8
// elements a cycle and multiprocessor then, at 16 instructions each 2.4 of the 4 that it issues. LayerNorm, with
// twice the instructions, needs them all.
int64_t most_blocks(const NormQuantizeParams& p) {
  const int64_t processors = std::max<int64_t>(multiprocessor_count(), 1);
  if (p.subtract_mean || p.weight == nullptr) return processors;
  const int64_t cheap = p.tokens * bytes_per_token(p) / (20 * parameter_bytes(p) + 1);
  return std::max<int64_t>(std::min<int64_t>(cheap, processors), ceil_div(2 * processors, 3));
}

// Shared memory: what the kernel declares, at most, and what a block may have beside it.
constexpr int64_t kDeclaredShared = 4096;
static_assert(RowGroup::kPartials * sizeof(float) + 16 <= kDeclaredShared);
int64_t dynamic_shared_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kDeclaredShared;
}

template <typename Row, bool kSubtractMean>
Status launch_kernel(const NormQuantizeParams& p, int64_t threads, Stream stream) {
  // Rows go to other blocks first and share one after that.
  int64_t rows = kMaxNormThreads<Row> / threads;
  if (threads > kWarpSize) rows = std::min<int64_t>(rows, kMaxGroupsWithBarrier);
  rows = std::max<int64_t>(
      std::min<int64_t>(rows, ceil_div(p.tokens, std::max<int64_t>(multiprocessor_count(), 1))), 1);
  const int64_t blocks = std::min<int64_t>(ceil_div(p.tokens, rows), most_blocks(p));
  const int64_t shared_bytes = Row::kInRegisters ? parameter_bytes(p) : 0;
  const auto kernel = norm_quantize_kernel<Row, kSubtractMean>;
  const Status allowed = allow_shared_memory(kernel, shared_bytes, kDeclaredShared);
  if (!allowed.is_ok()) return allowed;
  const dim3 block(static_cast<uint32_t>(threads), static_cast<uint32_t>(rows));
  kernel<<<static_cast<uint32_t>(blocks), block, static_cast<size_t>(shared_bytes),
           to_cuda(stream)>>>(p, Row::kVec == 1 || vectors_fit(p, Row::kVec));
  return check_launch();
}
template <typename Row>
Status launch(const NormQuantizeParams& p, int64_t threads, Stream stream) {
  return p.subtract_mean ? launch_kernel<Row, true>(p, threads, stream)
                         : launch_kernel<Row, false>(p, threads, stream);
}

// Whole warps that hold a row with Row::kValues elements a thread; 0 where a block cannot, or where its
// weight and bias do not fit shared memory.
template <typename Row>
int64_t threads_for(const NormQuantizeParams& p) {
  const int64_t threads =
      std::max<int64_t>(ceil_div(p.dim, Row::kValues * kWarpSize), 1) * kWarpSize;
  const bool fits = threads <= kMaxNormThreads<Row> && parameter_bytes(p) <= dynamic_shared_limit();
  return fits ? threads : 0;
}
template <typename Row>
bool fills(const NormQuantizeParams& p) {
  return threads_for<Row>(p) * Row::kValues == p.dim;
}

// 16 elements a thread, or 24 where that leaves no lane without work (dim 768: one warp instead of one and a
// half). Longer rows are read again in each pass.
template <int32_t kVec>
Status launch_vectors(const NormQuantizeParams& p, Stream stream) {
  using Full16 = RegisterRow<kVec, 16 / kVec, true>;
  using Full24 = RegisterRow<kVec, 24 / kVec, true>;
  using Row16 = RegisterRow<kVec, 16 / kVec, false>;
  using Row24 = RegisterRow<kVec, 24 / kVec, false>;
  using Long = MemoryRow<4, NormSource>;
  const bool has_vectors = vectors_fit(p, kVec);
  if (has_vectors && fills<Full16>(p)) return launch<Full16>(p, threads_for<Full16>(p), stream);
  if (has_vectors && fills<Full24>(p)) return launch<Full24>(p, threads_for<Full24>(p), stream);
  if (!fills<Row16>(p) && fills<Row24>(p)) {  // Full24 with another access
    return launch<Row24>(p, threads_for<Row24>(p), stream);
  }
  if (threads_for<Row16>(p) > 0) return launch<Row16>(p, threads_for<Row16>(p), stream);
  return launch<Long>(p, kMaxNormThreads<Long>, stream);
}
Status launch_elements(const NormQuantizeParams& p, Stream stream) {
  using Row = RegisterRow<1, 8, false>;
  using Long = MemoryRow<1, NormSource>;
  if (threads_for<Row>(p) > 0) return launch<Row>(p, threads_for<Row>(p), stream);
  return launch<Long>(p, kMaxNormThreads<Long>, stream);
}

}  // namespace

Status norm_quantize(const NormQuantizeParams& p, Stream stream) {
  if (p.tokens == 0) return Status::ok();
  switch (vector_width(p)) {
    case 8:
      return launch_vectors<8>(p, stream);
    case 4:
      return launch_vectors<4>(p, stream);
    default:
      return launch_elements(p, stream);
  }
}

}  // namespace mambaquant::cuda
