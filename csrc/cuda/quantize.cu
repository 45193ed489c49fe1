// Launchers of quantize and dequantize.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/quantize_kernel.cuh"
#include "mambaquant/dispatch.h"

namespace mambaquant::cuda {

namespace {

constexpr int64_t kMaxGridY = 65535;

// Calls body(IntTag<elements of a vector>): as wide as 16 bytes of the float side, or narrower where width,
// strides and starts of the matrices ask for it.
struct Matrix {
  const void* data;
  int64_t stride_bytes, element_size;
};
bool fits(int64_t vec, int64_t dim, const Matrix& a, const Matrix& b) {
  return dim % vec == 0 && is_aligned(a.data, a.stride_bytes, vec * a.element_size) &&
         is_aligned(b.data, b.stride_bytes, vec * b.element_size);
}
template <typename Body>
Status with_vector_width(int64_t dim, const Matrix& floats, const Matrix& q, const Body& body) {
  if (floats.element_size == 2 && fits(8, dim, floats, q)) return body(IntTag<8>{});
  if (floats.element_size == 4 && fits(4, dim, floats, q)) return body(IntTag<4>{});
  return body(IntTag<1>{});
}
template <typename Body>
Status with_vector_width(const QuantizeParams& p, const Body& body) {
  const int64_t size = element_size(p.x_dtype);
  return with_vector_width(p.dim, {p.x, p.x_stride_token * size, size}, {p.q, p.dim, 1}, body);
}
template <typename Body>
Status with_vector_width(const DequantizeParams& p, const Body& body) {
  const int64_t size = element_size(p.x_dtype);
  return with_vector_width(p.dim, {p.x, p.dim * size, size}, {p.q, p.q_stride_token, 1}, body);
}

template <typename Op>
Status launch_rows(const typename Op::Params& p, Stream stream) {
  const int64_t vectors = p.dim / Op::kVec;
  int64_t threads = kWarpSize;  // of a row
  while (threads < kQuantizeThreads && threads * kVectorsInFlight < vectors) threads *= 2;
  const int64_t rows = kQuantizeThreads / threads;
  const dim3 grid(static_cast<uint32_t>(ceil_div(vectors, threads * kVectorsInFlight)),
                  static_cast<uint32_t>(std::min<int64_t>(ceil_div(p.tokens, rows), kMaxGridY)));
  const dim3 block(static_cast<uint32_t>(threads), static_cast<uint32_t>(rows));
  scale_rows_kernel<Op><<<grid, block, 0, to_cuda(stream)>>>(p);
  return check_launch();
}

// How kernels that walk down columns cut a matrix: as many tokens a block, up to 128, as leave three
// quarters of the multiprocessors a block.
struct TileGrid {
  int64_t tokens_per_block = 128;
  dim3 grid;
  dim3 block{kWarpSize, kTileWarps};

  TileGrid(int64_t tokens, int64_t dim, int64_t vec) {
    const int64_t tiles = ceil_div(dim, kWarpSize * vec);
    const int64_t enough = multiprocessor_count() * 3 / 4;
    while (tokens_per_block > kTileWarps * kVectorsInFlight &&
           tiles * ceil_div(tokens, tokens_per_block) < enough) {
      tokens_per_block /= 2;
    }
    tokens_per_block = std::max<int64_t>(tokens_per_block, ceil_div(tokens, kMaxGridY));
    grid = dim3(static_cast<uint32_t>(tiles),
                static_cast<uint32_t>(ceil_div(tokens, tokens_per_block)));
  }
};

template <typename Op>
Status launch_columns(const typename Op::Params& p, Stream stream) {
  const TileGrid tiles(p.tokens, p.dim, Op::kVec);
  scale_columns_kernel<Op>
      <<<tiles.grid, tiles.block, 0, to_cuda(stream)>>>(p, tiles.tokens_per_block);
  return check_launch();
}

// With the scales that p names. A contiguous matrix with one scale is one long row.
template <template <int32_t> typename Op, typename Params>
Status launch_static(Params p, bool is_contiguous, Stream stream) {
  if (p.tokens == 0 || p.dim == 0) return Status::ok();
  if (p.granularity == Granularity::kPerTensor && is_contiguous) {
    p.dim *= p.tokens;
    p.tokens = 1;
  }
  return with_vector_width(p, [&](auto vec) {
    using VecOp = Op<static_cast<int32_t>(decltype(vec)::value)>;
    return p.granularity == Granularity::kPerChannel ? launch_columns<VecOp>(p, stream)
                                                     : launch_rows<VecOp>(p, stream);
  });
}

// max|x|, then scales, per tensor or per channel; the quantization itself is then a static one.
Status measure_scales(const QuantizeParams& p, Stream stream) {
  const int64_t count = p.granularity == Granularity::kPerTensor ? 1 : p.dim;
  if (count == 0) return Status::ok();
  const Status cleared = to_status(
      cudaMemsetAsync(p.scale_out, 0, static_cast<size_t>(count) * sizeof(float), to_cuda(stream)));
  if (!cleared.is_ok()) return cleared;
  if (p.tokens > 0 && p.dim > 0) {
    const Status measured = with_vector_width(p, [&](auto vec) {
      constexpr auto kVec = static_cast<int32_t>(decltype(vec)::value);
      const TileGrid tiles(p.tokens, p.dim, kVec);
      amax_kernel<kVec><<<tiles.grid, tiles.block, 0, to_cuda(stream)>>>(p, tiles.tokens_per_block);
      return check_launch();
    });
    if (!measured.is_ok()) return measured;
  }
  const auto blocks = static_cast<uint32_t>(ceil_div(count, kQuantizeThreads));
  scale_from_amax_kernel<<<blocks, kQuantizeThreads, 0, to_cuda(stream)>>>(p.scale_out, count);
  return check_launch();
}

template <typename Row>
Status launch_tokens(const QuantizeParams& p, int64_t threads, Stream stream) {
  const int64_t rows = threads == kWarpSize ? 4 : 1;
  const dim3 block(static_cast<uint32_t>(threads), static_cast<uint32_t>(rows));
  const int64_t blocks = ceil_div(p.tokens, rows);
  if (blocks > INT32_MAX) return Status::unsupported("expected fewer than 2^31 blocks of tokens");
  quantize_tokens_kernel<Row><<<static_cast<uint32_t>(blocks), block, 0, to_cuda(stream)>>>(p);
  return check_launch();
}

Status quantize_tokens(const QuantizeParams& p, Stream stream) {
  if (p.tokens == 0) return Status::ok();
  return with_vector_width(p, [&](auto vec) {
    constexpr auto kVec = static_cast<int32_t>(decltype(vec)::value);
    constexpr int32_t kVectors = kTokenValues / kVec;
    const int64_t warps = std::max<int64_t>(ceil_div(p.dim, kTokenValues * kWarpSize), 1);
    const int64_t threads = warps * kWarpSize;
    if (threads > kMaxTokenThreads) {
      return launch_tokens<MemoryRow<kVec, PlainSource>>(p, kMaxTokenThreads, stream);
    }
    if constexpr (kVec > 1) {
      if (threads * kTokenValues == p.dim) {
        return launch_tokens<RegisterRow<kVec, kVectors, true>>(p, threads, stream);
      }
    }
    return launch_tokens<RegisterRow<kVec, kVectors, false>>(p, threads, stream);
  });
}

}  // namespace

Status quantize(const QuantizeParams& p, Stream stream) {
  const bool is_contiguous = p.x_stride_token == p.dim;
  if (p.scale != nullptr) return launch_static<QuantizeOp>(p, is_contiguous, stream);
  if (p.granularity == Granularity::kPerToken) return quantize_tokens(p, stream);
  const Status measured = measure_scales(p, stream);
  if (!measured.is_ok()) return measured;
  QuantizeParams measured_params = p;
  measured_params.scale = p.scale_out;
  return launch_static<QuantizeOp>(measured_params, is_contiguous, stream);
}

Status dequantize(const DequantizeParams& p, Stream stream) {
  return launch_static<DequantizeOp>(p, p.q_stride_token == p.dim, stream);
}

}  // namespace mambaquant::cuda
