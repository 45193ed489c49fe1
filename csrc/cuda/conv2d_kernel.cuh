// depthwise_conv2d_quantize on the device. Formula: mambaquant/conv2d.h.
//
// A warp takes 32 lanes' worth of channels (kVec neighbours a lane, 128 bytes of each pixel) and a piece of an image:
// a strip of kStrip output columns and a chunk of its rows, which it walks down. Of each column under the strip a
// lane keeps the inputs of the last kSize rows, channel by channel, as the bytes of one word (3 rows) or two (5 or
// 7), the latest on top. A new row costs a byte permutation for each word, and an output a dp4a for each word of the
// columns under the kernel, with taps that are packed alike. So each input is loaded once a strip and chunk.
//
// A kernel of other sizes is one of kSize x kSize, the next of 3, 5 and 7, with zeros around it.
//
// Bound: bytes and instructions alike. An output of a 3 x 3 kernel moves 2 bytes and takes 27 instructions, most of
// them the epilogue's; an A100 can move 5 such outputs a cycle and multiprocessor and issue the instructions of 4.7.
// One of a 7 x 7 kernel with stride 2 moves 5 bytes and takes 69 instructions: 2 and 1.9. That is counted where a warp
// walks down some twenty rows; less work is cut into shorter chunks, each of which reads kSize - kStride rows more
// than its own, as a strip reads kSize - kStride columns more, mostly from L1 and L2.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/conv_epilogue.cuh"
#include "mambaquant/conv2d.h"

namespace mambaquant::cuda {

struct Conv2dPlan {
  int64_t strips = 1, chunks = 1, rows_per_chunk = 0, pieces = 0;
};

template <int32_t kKernelSize, int32_t kKernelStride>
struct Conv2dShape {
  static constexpr int32_t kSize = kKernelSize, kStride = kKernelStride;
  static constexpr int32_t kWords = (kSize + 3) / 4;  // of a column's inputs
  static constexpr int32_t kStrip = kSize == 3 && kStride == 1 ? 7 : 4;
  static constexpr int32_t kColumns = (kStrip - 1) * kStride + kSize;
  // Outputs that are computed side by side: the few taps of a small kernel stay in registers, those of a large one
  // are fetched once for all.
  static constexpr int32_t kGroup = kSize == 3 ? 1 : kStrip;
  static constexpr int32_t kWarps = 4;
  static constexpr int32_t kBlocks = kSize == 3 ? 5 : 3;  // a multiprocessor, at least
};

// Of the channels of a block, in shared memory.
template <typename Shape, int32_t kChannels>
struct alignas(16) Conv2dParameters {
  uint32_t taps[Shape::kSize][Shape::kWords][kChannels];
  ConvEpilogue<kChannels> epilogue;

  __device__ void read(const DepthwiseConv2dQuantizeParams& p, int64_t channel, int32_t i) {
    const auto top = static_cast<int32_t>(Shape::kSize - p.kernel_height) / 2;
    const auto left = static_cast<int32_t>(Shape::kSize - p.kernel_width) / 2;
    for (int32_t n = 0; n < Shape::kSize; ++n) {
      uint32_t words[Shape::kWords] = {};
#pragma unroll
      for (int32_t m = 0; m < Shape::kSize; ++m) {
        const int64_t row = m - top, column = n - left;
        if (row < 0 || row >= p.kernel_height || column < 0 || column >= p.kernel_width) continue;
        const int8_t* tap = p.weight + (row * p.kernel_width + column) * p.dim + channel;
        const int32_t byte = 4 * Shape::kWords - Shape::kSize + m;
        words[byte / 4] |= load_bytes<1>(tap) << (byte % 4 * 8);
      }
#pragma unroll
      for (int32_t w = 0; w < Shape::kWords; ++w) taps[n][w][i] = words[w];
    }
    epilogue.read(p, channel, i);
  }
};

// A lane's inputs of the last rows under a strip.
template <typename Shape, int32_t kVec>
struct Conv2dWindow {
  uint32_t words[Shape::kColumns][Shape::kWords][kVec] = {};

  // Byte i of inputs[j] is channel i's next input in column j.
  __device__ void push(const uint32_t (&inputs)[Shape::kColumns]) {
#pragma unroll
    for (int32_t j = 0; j < Shape::kColumns; ++j) {
#pragma unroll
      for (int32_t i = 0; i < kVec; ++i) {
#pragma unroll
        for (int32_t w = 0; w + 1 < Shape::kWords; ++w) {
          words[j][w][i] = __byte_perm(words[j][w][i], words[j][w + 1][i], 0x4321u);
        }
        uint32_t& last = words[j][Shape::kWords - 1][i];
        last = __byte_perm(last, inputs[j], 0x4321u + (static_cast<uint32_t>(i) << 12));
      }
    }
  }
};

// The rows of x under a strip, from its first column and the lane's first channel on. Beyond the image x is 0.
template <typename Shape, int32_t kVec>
struct Conv2dInput {
  const int8_t* x;
  int64_t y, height, row_stride, column_stride;
  uint32_t columns = 0;  // bit j: the strip's column j lies in the image

  __device__ Conv2dInput(const DepthwiseConv2dQuantizeParams& p, int64_t b, int64_t top,
                         int64_t left, int64_t channel)
      : x(p.x + b * p.x_stride_batch + top * p.x_stride_row + left * p.x_stride_column + channel),
        y(top),
        height(p.height),
        row_stride(p.x_stride_row),
        column_stride(p.x_stride_column) {
#pragma unroll
    for (int32_t j = 0; j < Shape::kColumns; ++j) {
      if (left + j >= 0 && left + j < p.width) columns |= 1u << j;
    }
  }

  // Goes on to the next row. Addresses are carried on from column to column, since multiples of the stride would
  // take two registers each.
  __device__ void next(uint32_t (&inputs)[Shape::kColumns]) {
    const uint32_t inside = opaque(y >= 0 && y < height ? columns : 0u);
    const int8_t* at = x;
#pragma unroll
    for (int32_t j = 0; j < Shape::kColumns; ++j, at += opaque(column_stride)) {
      inputs[j] = (inside >> j & 1u) != 0 ? load_bytes<kVec>(at) : 0;
    }
    x += row_stride;
    ++y;
  }
};

// A row of the strip's outputs, of which the first `count` exist.
template <typename Shape, int32_t kVec, int32_t kChannels>
__device__ inline void store_outputs(const Conv2dParameters<Shape, kChannels>& parameters,
                                     const Conv2dWindow<Shape, kVec>& window, float qmin, int8_t* q,
                                     int64_t dim, int32_t count) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) * kVec;
  const ConvEpilogue<kVec> epilogue = parameters.epilogue.template take<kVec>(lane);
#pragma unroll
  for (int32_t group = 0; group < Shape::kStrip; group += Shape::kGroup) {
    int32_t sums[Shape::kGroup][kVec];
#pragma unroll
    for (int32_t k = 0; k < Shape::kGroup * kVec; ++k) {
      sums[k / kVec][k % kVec] = static_cast<int32_t>(kRounderBits);
    }
#pragma unroll
    for (int32_t n = 0; n < Shape::kSize; ++n) {
#pragma unroll
      for (int32_t w = 0; w < Shape::kWords; ++w) {
        const auto taps = load_vec<kVec>(&parameters.taps[n][w][lane]);
#pragma unroll
        for (int32_t o = 0; o < Shape::kGroup; ++o) {
          const auto& inputs = window.words[(group + o) * Shape::kStride + n][w];
#pragma unroll
          for (int32_t i = 0; i < kVec; ++i) {
            sums[o][i] =
                __dp4a(static_cast<int32_t>(inputs[i]), static_cast<int32_t>(taps[i]), sums[o][i]);
          }
        }
      }
    }
#pragma unroll
    for (int32_t o = 0; o < Shape::kGroup; ++o, q += dim) {
      if (group + o < count) store_bytes<kVec>(q, epilogue.quantize(sums[o], qmin));
    }
  }
}

// Grid (blocks of pieces, tiles of channels), block (32 lanes, warps).
template <typename Shape, int32_t kVec>
__global__ void __launch_bounds__(Shape::kWarps* kWarpSize, Shape::kBlocks)
    conv2d_kernel(const __grid_constant__ DepthwiseConv2dQuantizeParams p,
                  const __grid_constant__ Conv2dPlan plan) {
  constexpr int32_t kChannels = kVec * kWarpSize;
  __shared__ Conv2dParameters<Shape, kChannels> parameters;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * kChannels;
  for (auto i = static_cast<int32_t>(threadIdx.y * kWarpSize + threadIdx.x); i < kChannels;
       i += Shape::kWarps * kWarpSize) {
    if (tile + i < p.dim) parameters.read(p, tile + i, i);
  }
  __syncthreads();
  const int64_t channel = tile + static_cast<int64_t>(threadIdx.x) * kVec;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * Shape::kWarps + threadIdx.y;
  if (channel >= p.dim || piece >= plan.pieces) return;
  const int64_t strip = piece % plan.strips, chunk = piece / plan.strips % plan.chunks;
  const int64_t b = piece / plan.strips / plan.chunks;

  const int64_t out_height = p.out_height(), out_width = p.out_width();
  const int64_t first_row = chunk * plan.rows_per_chunk;
  const int64_t rows = min(plan.rows_per_chunk, out_height - first_row);
  const int64_t first_column = strip * Shape::kStrip;
  const auto count = static_cast<int32_t>(min(int64_t{Shape::kStrip}, out_width - first_column));
  Conv2dInput<Shape, kVec> input(p, b, first_row * Shape::kStride - Shape::kSize / 2,
                                 first_column * Shape::kStride - Shape::kSize / 2, channel);
  int8_t* q = p.q + ((b * out_height + first_row) * out_width + first_column) * p.dim + channel;
  const float qmin = conv_qmin(p);

  Conv2dWindow<Shape, kVec> window;
  uint32_t inputs[Shape::kColumns];
#pragma unroll 1
  for (int32_t r = 0; r < Shape::kSize - Shape::kStride; ++r) {
    input.next(inputs);
    window.push(inputs);
  }
#pragma unroll 1
  for (int64_t row = 0; row < rows; ++row, q += out_width * p.dim) {
#pragma unroll
    for (int32_t r = 0; r < Shape::kStride; ++r) {
      input.next(inputs);
      window.push(inputs);
    }
    store_outputs<Shape, kVec, kChannels>(parameters, window, qmin, q, p.dim, count);
  }
}

}  // namespace mambaquant::cuda
