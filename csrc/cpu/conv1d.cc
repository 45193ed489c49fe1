// causal_conv1d_quantize. q = quantize(SiLU(conv(x) * scale + bias)), one channel per lane.
//
// A task is 64 tokens by 64 channels (one cache line of each token's row). Within it a vector of
// channels walks down the tokens with the last width - 1 inputs in registers, so that each input is
// converted once; the tile's other vectors then find the same 64 lines in L1. Tasks meet only in
// reading the width - 1 tokens before them, so that a split changes no bit. Where an `order` is given
// the 64 tokens are those of 64 steps of the walk, wherever they lie.
//
// NOTE(exact-fma): the inputs and taps are integers of magnitude <= 128 and the sum of four
// products is below 2^17, so that float32 fma computes the integer sum without rounding.
//
// Bound: arithmetic. An element moves 2 bytes, but a vector of them takes 22 instructions, of which
// SiLU has 9 and a division: 12 multiplications and 5 additions or conversions, 6 cycles on two pipes of
// each (Zen 5), 11 on two ports, and there the division alone 16. Measured (AVX-512, Zen 5): 11 cycles per
// vector in the 130m layer, blocks of 128 tokens. One token of it takes 20 cycles per vector, which load
// all that is of a channel for a single use.
#include "mambaquant/conv1d.h"

#include <cstring>

#include "cpu/conv_epilogue.h"
#include "cpu/kernels.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kTileTokens = 64;
constexpr int64_t kTileChannels = 64;
constexpr int64_t kElementsPerThread = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One sequence: step t of the walk reads x + row(t) * x_stride. A walk backwards is one over negative
// strides, or down an order.
struct Sequence {
  const int8_t* x;
  const int8_t* initial_state;
  int8_t* q;
  int8_t* final_state;
  int64_t x_stride, q_stride;
  const int32_t* order;  // or null
  int64_t order_step;

  int64_t row(int64_t t) const { return order == nullptr ? t : order[t * order_step]; }
};

Sequence sequence_of(const CausalConv1dQuantizeParams& p, int64_t b) {
  const int64_t state = b * (p.width - 1) * p.dim;
  Sequence s;
  s.x = p.x + b * p.x_stride_batch;
  s.q = p.q + b * p.seqlen * p.dim;
  s.x_stride = p.x_stride_token;
  s.q_stride = p.dim;
  s.order = p.order;
  s.order_step = 1;
  if (p.reverse && p.order != nullptr) {
    s.order += p.seqlen - 1;
    s.order_step = -1;
  } else if (p.reverse && p.seqlen > 0) {
    s.x += (p.seqlen - 1) * s.x_stride;
    s.q += (p.seqlen - 1) * s.q_stride;
    s.x_stride = -s.x_stride;
    s.q_stride = -s.q_stride;
  }
  s.initial_state = p.initial_state == nullptr ? nullptr : p.initial_state + state;
  s.final_state = p.final_state + state;
  return s;
}

// The token of step t, the state in front of the first; t >= -(width - 1).
F32 load_token(const CausalConv1dQuantizeParams& p, const Sequence& s, int64_t t, int64_t c,
               int64_t n) {
  if (t >= 0) return load_up_to(s.x + s.row(t) * s.x_stride + c, n);
  if (s.initial_state == nullptr) return set1(0.0f);
  return load_up_to(s.initial_state + (p.width - 1 + t) * p.dim + c, n);
}

// One vector of channels from step `begin` to `end`.
template <int kWidth, bool kOrdered>
void convolve(const CausalConv1dQuantizeParams& p, const Sequence& s, int64_t c, int64_t n,
              int64_t begin, int64_t end) {
  F32 weight[kWidth];
  for (int j = 0; j < kWidth; ++j) weight[j] = load_up_to(p.weight + j * p.dim + c, n);
  F32 window[kWidth];  // inputs, oldest first
  for (int j = 0; j + 1 < kWidth; ++j)
    window[j + 1] = load_token(p, s, begin - kWidth + 1 + j, c, n);
  const ConvEpilogue epilogue(p, c, n);
  const int8_t* x = s.x + begin * s.x_stride + c;
  int8_t* out = s.q + begin * s.q_stride + c;
  const int64_t x_stride = s.x_stride, q_stride = s.q_stride;
  for (int64_t t = begin; t < end; ++t, x += x_stride, out += q_stride) {
    if constexpr (kOrdered) {
      const int64_t row = s.row(t);
      x = s.x + row * x_stride + c;
      out = s.q + row * q_stride + c;
    }
    prefetch(x + kTileChannels);
    for (int j = 0; j + 1 < kWidth; ++j) window[j] = window[j + 1];
    window[kWidth - 1] = load_up_to(x, n);
    F32 acc = weight[0] * window[0];
    for (int j = 1; j < kWidth; ++j) acc = fma(weight[j], window[j], acc);  // NOTE(exact-fma)
    epilogue.store_quantized(out, acc, n);
  }
}

// The last width - 1 rows of state and sequence together. Rows go up in order, so that the update
// may write over the state that it reads.
void store_final_state(const CausalConv1dQuantizeParams& p, const Sequence& s, int64_t c,
                       int64_t channels) {
  for (int64_t i = 0; i < p.width - 1; ++i) {
    const int64_t t = p.seqlen - (p.width - 1) + i;
    int8_t* row = s.final_state + i * p.dim + c;
    const size_t size = static_cast<size_t>(channels);
    if (t >= 0) {
      std::memcpy(row, s.x + s.row(t) * s.x_stride + c, size);
    } else if (s.initial_state == nullptr) {
      std::memset(row, 0, size);
    } else {
      std::memmove(row, s.initial_state + (p.width - 1 + t) * p.dim + c, size);
    }
  }
}

// The whole of a sequence of one token, channels [c_begin, c_end).
template <int kWidth>
void convolve_token(const CausalConv1dQuantizeParams& p, const Sequence& s, int64_t c_begin,
                    int64_t c_end) {
  const int8_t* const x = s.x + s.row(0) * s.x_stride;
  int8_t* const q = s.q + s.row(0) * s.q_stride;
  for (int64_t c = c_begin; c < c_end; c += kLanes) {
    const int64_t n = smaller(kLanes, c_end - c);
    F32 acc = load_up_to(p.weight + (kWidth - 1) * p.dim + c, n) * load_up_to(x + c, n);
    if (s.initial_state != nullptr) {
#pragma GCC unroll 4
      for (int j = 0; j + 1 < kWidth; ++j) {  // NOTE(exact-fma)
        const int64_t at = j * p.dim + c;
        acc = fma(load_up_to(p.weight + at, n), load_up_to(s.initial_state + at, n), acc);
      }
    }
    ConvEpilogue(p, c, n).store_quantized(q + c, acc, n);
  }
  store_final_state(p, s, c_begin, c_end - c_begin);
}

template <int kWidth>
void convolve_tokens(const CausalConv1dQuantizeParams& p, const Threads& threads) {
  const int64_t tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  const int64_t grain = kElementsPerThread / kTileChannels;
  threads.parallel_for(p.batch * tiles, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t b = first / tiles, stop = smaller(last, (b + 1) * tiles);
      const int64_t c_end = smaller((stop - b * tiles) * kTileChannels, p.dim);
      convolve_token<kWidth>(p, sequence_of(p, b), (first - b * tiles) * kTileChannels, c_end);
      first = stop;
    }
  });
}

template <int kWidth, bool kOrdered>
void convolve_all(const CausalConv1dQuantizeParams& p, const Threads& threads) {
  const int64_t tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  // An empty sequence has one empty block, which passes the state on.
  const int64_t blocks = p.seqlen == 0 ? 1 : (p.seqlen + kTileTokens - 1) / kTileTokens;
  const int64_t elements_per_task = smaller(p.seqlen, kTileTokens) * kTileChannels;
  const int64_t grain = kElementsPerThread / (elements_per_task + 1) + 1;
  threads.parallel_for(p.batch * blocks * tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t block = task / tiles % blocks;
      const int64_t tile = task % tiles * kTileChannels;
      const int64_t tile_end = smaller(tile + kTileChannels, p.dim);
      const int64_t begin = block * kTileTokens;
      const int64_t end = smaller(begin + kTileTokens, p.seqlen);
      const Sequence s = sequence_of(p, task / tiles / blocks);
      for (int64_t c = tile; c < tile_end; c += kLanes) {
        convolve<kWidth, kOrdered>(p, s, c, smaller(kLanes, tile_end - c), begin, end);
      }
      if (block == blocks - 1) store_final_state(p, s, tile, tile_end - tile);
    }
  });
}

template <int kWidth>
Status convolve_all(const CausalConv1dQuantizeParams& p, const Threads& threads) {
  if (p.seqlen == 1) {
    convolve_tokens<kWidth>(p, threads);
  } else if (p.order == nullptr) {
    convolve_all<kWidth, false>(p, threads);
  } else {
    convolve_all<kWidth, true>(p, threads);
  }
  return Status::ok();
}

}  // namespace

Status causal_conv1d_quantize(const CausalConv1dQuantizeParams& p, const Threads& threads) {
  switch (p.width) {
    case 2:
      return convolve_all<2>(p, threads);
    case 3:
      return convolve_all<3>(p, threads);
    case 4:
      return convolve_all<4>(p, threads);
    default:
      return Status::unsupported("expected weight of width 2, 3 or 4");
  }
}

}  // namespace mambaquant::cpu::MBQ_ISA
