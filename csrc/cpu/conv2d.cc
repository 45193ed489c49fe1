// depthwise_conv2d_quantize. q = quantize(SiLU(conv(x) * scale + bias)), one channel per lane.
//
// A task is some rows of the output by 64 channels (one cache line of each pixel), and neighbouring tasks
// are neighbouring rows, so that the rows which outputs share are read again from L1. Within a task a vector
// of channels goes along each row strip by strip. A strip is 7 outputs, whose sums stay in registers while
// the kernel's rows are gone through two at a time: a column's two inputs become a pair of int16, which meets
// the pair of taps of every output of the strip that it belongs to by one multiply-add (vpdpwssd, vpmaddwd).
// 7 divides the grids of the usual models (56, 28, 14 and 7); where it does not, the last strip computes
// sums that nobody stores.
//
// Bound: arithmetic. An output moves 2 bytes (5 with stride 2). A vector of outputs of a 3 x 3 kernel takes 28
// instructions: 9/7 columns of 5 to make pairs, 6 multiply-adds, and 15 and a division for the epilogue; one
// of a 7 x 7 kernel 67: 13/7 columns of 13, 28 multiply-adds, the epilogue. Measured (AVX-512, Zen 5, one
// thread, a vector of 16): 3.7 ns for 3 x 3, and 11 ns for 7 x 7 with stride 2. A path
// without comparisons for strips that lie within the image gained 7 % on large grids and lost as much on small.
#include "mambaquant/conv2d.h"

#include "cpu/conv_epilogue.h"
#include "cpu/kernels.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

using Params = DepthwiseConv2dQuantizeParams;

constexpr int kStrip = 7;
constexpr int64_t kTileChannels = 64;
constexpr int64_t kTaskOutputs = 64;
constexpr int64_t kElementsPerThread = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int8_t kZeros[kLanes] = {};

// A row of x from a channel on; outside the image, a row of zeros.
struct Row {
  Row(const Params& p, const int8_t* image, int64_t y)
      : x(y < 0 || y >= p.height ? kZeros : image + y * p.x_stride_row),
        step(x == kZeros ? 0 : p.x_stride_column) {}
  const int8_t* x;
  int64_t step;
};

// The kernel two rows at a time, of one vector of channels; the last row, whose number is even, is paired with zeros.
template <int kWidth>
struct Taps {
  Taps(const Params& p, int64_t c, int64_t n) {
    for (int64_t y = 0; y < p.kernel_height; y += 2) {
      for (int64_t x = 0; x < kWidth; ++x) {
        const int8_t* row = p.weight + (y * kWidth + x) * p.dim + c;
        const int8_t* next = y + 1 < p.kernel_height ? row + kWidth * p.dim : kZeros;
        pairs[y / 2][x] = n == kLanes ? load_pairs(row, next) : load_pairs(row, next, n);
      }
    }
  }
  Pairs pairs[kMaxConv2dKernel / 2 + 1][kWidth];
};

// Adds what a pair of rows (or a single one) gives to the sums of a strip. load(column) are the inputs there,
// `first` the leftmost column that the strip reads.
template <int kStride, int kWidth, typename Load>
inline void add_rows(const Params& p, int64_t first, const Pairs (&taps)[kWidth], const Load& load,
                     I32 (&sums)[kStrip]) {
#pragma GCC unroll 19
  for (int j = 0; j < (kStrip - 1) * kStride + kWidth; ++j) {
    const int64_t column = first + j;
    if (column < 0 || column >= p.width) continue;
    const Pairs x = load(column);
#pragma GCC unroll 7
    for (int o = 0; o < kStrip; ++o) {
      const int tap = j - o * kStride;
      if (tap >= 0 && tap < kWidth) sums[o] = dot(sums[o], x, taps[tap]);
    }
  }
}

// Rows [begin, end) of the output of one image, one vector of channels.
template <int kStride, int kWidth>
void convolve(const Params& p, int64_t b, int64_t c, int64_t n, int64_t begin, int64_t end) {
  const Taps<kWidth> taps(p, c, n);
  const ConvEpilogue epilogue(p, c, n);
  const int8_t* image = p.x + b * p.x_stride_batch + c;
  const int64_t out_width = p.out_width();
  int8_t* out = p.q + (b * p.out_height() + begin) * out_width * p.dim + c;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t top = i * kStride - p.kernel_height / 2;
    for (int64_t j = 0; j < out_width; j += kStrip) {
      const int64_t first = j * kStride - kWidth / 2;
      I32 sums[kStrip];
      for (I32& sum : sums) sum = set1_i32(0);
      int64_t y = 0;
      for (; y + 1 < p.kernel_height; y += 2) {
        const Row upper(p, image, top + y), lower(p, image, top + y + 1);
        const auto load = [&](int64_t column) {
          const int8_t *a = upper.x + column * upper.step, *b = lower.x + column * lower.step;
          return n == kLanes ? load_pairs(a, b) : load_pairs(a, b, n);
        };
        add_rows<kStride>(p, first, taps.pairs[y / 2], load, sums);
      }
      const Row last(p, image, top + y);
      const auto load = [&](int64_t column) {
        const int8_t* a = last.x + column * last.step;
        return n == kLanes ? load_pairs(a) : load_pairs(a, n);
      };
      add_rows<kStride>(p, first, taps.pairs[y / 2], load, sums);
#pragma GCC unroll 7
      for (int o = 0; o < kStrip; ++o) {
        if (j + o < out_width) {
          epilogue.store_quantized(out, to_f32(sums[o]), n);
          out += p.dim;
        }
      }
    }
  }
}

template <int kStride, int kWidth>
Status convolve_all(const Params& p, const Threads& threads) {
  const int64_t tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  const int64_t rows_per_task = larger(1, kTaskOutputs / larger(1, p.out_width()));
  const int64_t blocks = (p.out_height() + rows_per_task - 1) / rows_per_task;
  const int64_t elements_per_task = rows_per_task * p.out_width() * kTileChannels;
  const int64_t grain = kElementsPerThread / (elements_per_task + 1) + 1;
  threads.parallel_for(p.batch * tiles * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % blocks * rows_per_task;
      const int64_t end = smaller(begin + rows_per_task, p.out_height());
      const int64_t tile = task / blocks % tiles * kTileChannels;
      const int64_t tile_end = smaller(tile + kTileChannels, p.dim);
      for (int64_t c = tile; c < tile_end; c += kLanes) {
        convolve<kStride, kWidth>(p, task / blocks / tiles, c, smaller(kLanes, tile_end - c), begin,
                                  end);
      }
    }
  });
  return Status::ok();
}

template <int kStride>
Status convolve_all(const Params& p, const Threads& threads) {
  switch (p.kernel_width) {
    case 1:
      return convolve_all<kStride, 1>(p, threads);
    case 3:
      return convolve_all<kStride, 3>(p, threads);
    case 5:
      return convolve_all<kStride, 5>(p, threads);
    default:
      return convolve_all<kStride, 7>(p, threads);
  }
}

}  // namespace

Status depthwise_conv2d_quantize(const Params& p, const Threads& threads) {
  if (!is_conv2d_kernel_size(p.kernel_height) || !is_conv2d_kernel_size(p.kernel_width)) {
    return Status::unsupported("expected a weight of odd height and width from 1 to 7");
  }
  if (p.stride != 1 && p.stride != 2) return Status::unsupported("expected stride 1 or 2");
  return p.stride == 1 ? convolve_all<1>(p, threads) : convolve_all<2>(p, threads);
}

}  // namespace mambaquant::cpu::MBQ_ISA
