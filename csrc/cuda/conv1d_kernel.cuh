// causal_conv1d_quantize on the device. Formula: mambaquant/conv1d.h.
//
// A lane owns kVec neighbouring channels, a warp 32 lanes' worth (128 bytes of each token's row), and
// walks down the tokens of a piece: a sequence, or a chunk of one. Channel c keeps its last four inputs
// in a word, window[c] = x[t-3] | x[t-2] << 8 | x[t-1] << 16 | x[t] << 24, so that a token costs one byte
// permutation and one dp4a with the taps, which are packed alike (taps before a width below 4 are 0).
// The sum starts from the bits of 1.5 * 2^23 and so comes out as a float, without a conversion.
//
// Bound: bytes. An element moves 2 of them and takes 17 instructions, of which 2 (ex2 and rcp of SiLU)
// run at 16 lanes a cycle and multiprocessor. An A100 can move 5 elements a cycle and multiprocessor,
// issue the instructions of 7 and the special functions of 8. Parameters are 24 bytes a channel, read once
// a block through shared memory: 12 / (tokens of a block) of the elements' bytes; the width - 1 tokens
// that a chunk reads before its own are 1.5 / (tokens of the chunk) of them. An order adds 4 bytes a token
// and warp, to 256 of the elements.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/conv_epilogue.cuh"
#include "mambaquant/conv1d.h"

namespace mambaquant::cuda {

// Of a block, at most. Two such blocks a multiprocessor have 80 registers a thread.
inline constexpr int32_t kConvWarps = 12;
inline constexpr int32_t kTokensInFlight = 8;
// Tokens of an order are wanted twice, for x and for q: with 8 of them registers would be spilled.
inline constexpr int32_t kOrderedTokensInFlight = 4;
inline constexpr int32_t kWindow = 4;  // the largest width: inputs in a word

// Piece i is chunk i % chunks of sequence i / chunks; a warp takes pieces_per_warp neighbours.
struct ConvPlan {
  int64_t chunks = 1, tokens_per_chunk = 0, pieces = 0, pieces_per_warp = 1;
};

// Of the channels of a block, as they lie in shared memory, and of a lane, in registers.
template <int32_t kCount>
struct alignas(16) ChannelParameters {
  uint32_t taps[kCount];
  ConvEpilogue<kCount> epilogue;
};

template <int32_t kCount>
__device__ inline void read_channel(const CausalConv1dQuantizeParams& p, int64_t channel, int32_t i,
                                    ChannelParameters<kCount>& out) {
  const auto width = static_cast<int32_t>(p.width);
  uint32_t taps = 0;
#pragma unroll
  for (int32_t age = 0; age < kWindow; ++age) {
    if (age < width) {
      const uint32_t tap = load_bytes<1>(p.weight + (width - 1 - age) * p.dim + channel);
      taps |= tap << (8 * (kWindow - 1 - age));
    }
  }
  out.taps[i] = taps;
  out.epilogue.read(p, channel, i);
}

template <int32_t kVec, int32_t kCount>
__device__ inline ChannelParameters<kVec> take_lane(const ChannelParameters<kCount>& block) {
  ChannelParameters<kVec> lane;
  const int32_t first = static_cast<int32_t>(threadIdx.x) * kVec;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) lane.taps[i] = block.taps[first + i];
  lane.epilogue = block.epilogue.template take<kVec>(first);
  return lane;
}

// The last four inputs of a lane's channels.
template <int32_t kVec>
struct Window {
  uint32_t words[kVec] = {};

  // Byte i of `inputs` is channel i's next input.
  __device__ void push(uint32_t inputs) {
#pragma unroll
    for (int32_t i = 0; i < kVec; ++i) {
      words[i] = __byte_perm(words[i], inputs, 0x4321u + (static_cast<uint32_t>(i) << 12));
    }
  }
  // The inputs `age` tokens before the last, a byte for each channel.
  __device__ uint32_t inputs(int32_t age) const {
    const auto byte = static_cast<uint32_t>(kWindow - 1 - age);
    if constexpr (kVec == 1) {
      return words[0] >> (8 * byte) & 0xffu;
    } else {
      const uint32_t pick = byte | (byte + 4) << 4;
      const uint32_t low = __byte_perm(words[0], words[1], pick);
      return __byte_perm(low, __byte_perm(words[2], words[3], pick), 0x5410u);
    }
  }
};

// q of the last token in the window.
template <int32_t kVec>
__device__ inline uint32_t convolve(const Window<kVec>& window, const ChannelParameters<kVec>& c,
                                    float qmin) {
  int32_t sums[kVec];  // |acc| < 2^17
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) {
    sums[i] = __dp4a(static_cast<int32_t>(window.words[i]), static_cast<int32_t>(c.taps[i]),
                     static_cast<int32_t>(kRounderBits));
  }
  return c.epilogue.quantize(sums, qmin);
}

// A sequence in the order of the walk, from the lane's first channel on. A walk backwards is one over
// negative strides, or down an order.
template <bool kOrdered>
struct Sequence {
  const int8_t* x;
  const int8_t* initial_state;  // or null
  int8_t* q;
  int8_t* final_state;
  int64_t x_stride, q_stride;
  const int32_t* order;
  int64_t order_step;

  __device__ Sequence(const CausalConv1dQuantizeParams& p, int64_t b, int64_t channel)
      : x(p.x + b * p.x_stride_batch + channel),
        initial_state(p.initial_state),
        q(p.q + b * p.seqlen * p.dim + channel),
        final_state(p.final_state),
        x_stride(p.x_stride_token),
        q_stride(p.dim),
        order(p.order),
        order_step(1) {
    const int64_t state = b * (p.width - 1) * p.dim + channel;
    final_state += state;
    if (initial_state != nullptr) initial_state += state;
    if (!p.reverse) return;
    if constexpr (kOrdered) {
      order += p.seqlen - 1;
      order_step = -1;
    } else {
      x += (p.seqlen - 1) * x_stride;
      q += (p.seqlen - 1) * q_stride;
      x_stride = -x_stride;
      q_stride = -q_stride;
    }
  }
  // The next sequence of the batch.
  __device__ void advance(const CausalConv1dQuantizeParams& p) {
    x += p.x_stride_batch;
    q += p.seqlen * p.dim;
    final_state += (p.width - 1) * p.dim;
    if (initial_state != nullptr) initial_state += (p.width - 1) * p.dim;
  }
};

// Nobody has looked at the values of an order.
__device__ inline bool is_token(const CausalConv1dQuantizeParams& p, int64_t token) {
  return static_cast<uint64_t>(token) < static_cast<uint64_t>(p.seqlen);
}

// The inputs of step t of the walk.
template <int32_t kVec, bool kOrdered>
__device__ inline uint32_t load_step(const CausalConv1dQuantizeParams& p,
                                     const Sequence<kOrdered>& s, int64_t t) {
  if constexpr (kOrdered) {
    t = s.order[t * s.order_step];
    if (!is_token(p, t)) return 0;
  }
  return load_bytes<kVec>(s.x + t * s.x_stride);
}

// The window before step `begin`: earlier tokens, then the initial state, then zeros.
template <int32_t kVec, bool kOrdered>
__device__ inline Window<kVec> read_history(const CausalConv1dQuantizeParams& p,
                                            const Sequence<kOrdered>& s, int64_t begin) {
  const auto rows = static_cast<int32_t>(p.width) - 1;
  Window<kVec> window;
#pragma unroll
  for (int32_t age = kWindow - 2; age >= 0; --age) {
    const int64_t t = begin - 1 - age;
    uint32_t inputs = 0;
    if (age < rows && t >= 0) {
      inputs = load_step<kVec>(p, s, t);
    } else if (age < rows && s.initial_state != nullptr) {
      inputs = load_bytes<kVec>(s.initial_state + (rows + t) * p.dim);
    }
    window.push(inputs);
  }
  return window;
}

// Where a walk stands, at step t: the addresses of a token, or that of its place in the order.
template <bool kOrdered>
struct Position {
  const int8_t* x;
  int8_t* q;
  __device__ Position(const Sequence<false>& s, int64_t t)
      : x(s.x + t * s.x_stride), q(s.q + t * s.q_stride) {}
};
template <>
struct Position<true> {
  const int32_t* order;
  __device__ Position(const Sequence<true>& s, int64_t t) : order(s.order + t * s.order_step) {}
};

// kTokens tokens from x to q, all loads first. Addresses are carried on token by token: multiples of the
// strides would take 30 registers.
template <int32_t kVec, int32_t kTokens>
__device__ inline void walk(const CausalConv1dQuantizeParams&, const Sequence<false>& s,
                            const ChannelParameters<kVec>& channels, float qmin,
                            Position<false>& at, Window<kVec>& window) {
  uint32_t inputs[kTokens];
#pragma unroll
  for (int32_t i = 0; i < kTokens; ++i, at.x += s.x_stride) inputs[i] = load_bytes<kVec>(at.x);
#pragma unroll
  for (int32_t i = 0; i < kTokens; ++i, at.q += s.q_stride) {
    window.push(inputs[i]);
    store_bytes<kVec>(at.q, convolve(window, channels, qmin));
  }
}
// The same where an order names the tokens.
template <int32_t kVec, int32_t kTokens>
__device__ inline void walk(const CausalConv1dQuantizeParams& p, const Sequence<true>& s,
                            const ChannelParameters<kVec>& channels, float qmin, Position<true>& at,
                            Window<kVec>& window) {
  int32_t tokens[kTokens];
  uint32_t inputs[kTokens];
#pragma unroll
  for (int32_t i = 0; i < kTokens; ++i, at.order += s.order_step) tokens[i] = *at.order;
#pragma unroll
  for (int32_t i = 0; i < kTokens; ++i) {
    inputs[i] = is_token(p, tokens[i]) ? load_bytes<kVec>(s.x + tokens[i] * s.x_stride) : 0;
  }
#pragma unroll
  for (int32_t i = 0; i < kTokens; ++i) {
    window.push(inputs[i]);
    const uint32_t q = convolve(window, channels, qmin);
    if (is_token(p, tokens[i])) store_bytes<kVec>(s.q + tokens[i] * s.q_stride, q);
  }
}

// Rows of the final state come from the window, which was filled before any of them is written: the
// initial state may lie in the same memory.
template <int32_t kVec, bool kOrdered>
__device__ inline void store_final_state(const CausalConv1dQuantizeParams& p,
                                         const Sequence<kOrdered>& s, const Window<kVec>& window) {
  const auto rows = static_cast<int32_t>(p.width) - 1;
#pragma unroll
  for (int32_t age = 0; age < kWindow - 1; ++age) {
    if (age < rows) {
      store_bytes<kVec>(s.final_state + (rows - 1 - age) * p.dim, window.inputs(age));
    }
  }
}

// Grid (tiles of channels, slices of the pieces), block (32 lanes, warps).
template <int32_t kVec, bool kOrdered>
__global__ void __launch_bounds__(kConvWarps* kWarpSize, 2)
    conv1d_kernel(const __grid_constant__ CausalConv1dQuantizeParams p,
                  const __grid_constant__ ConvPlan plan) {
  constexpr int32_t kChannels = kVec * kWarpSize;
  constexpr int32_t kTokens = kOrdered ? kOrderedTokensInFlight : kTokensInFlight;
  __shared__ ChannelParameters<kChannels> shared;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kChannels;
  const auto threads = static_cast<int32_t>(blockDim.y) * kWarpSize;
  for (auto i = static_cast<int32_t>(threadIdx.y * kWarpSize + threadIdx.x); i < kChannels;
       i += threads) {
    if (tile + i < p.dim) read_channel(p, tile + i, i, shared);
  }
  __syncthreads();
  const int64_t channel = tile + static_cast<int64_t>(threadIdx.x) * kVec;
  if (channel >= p.dim) return;
  const ChannelParameters<kVec> channels = take_lane<kVec>(shared);
  const float qmin = conv_qmin(p);

  const int64_t warp = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t first = warp * plan.pieces_per_warp;
  const int64_t last = min(first + plan.pieces_per_warp, plan.pieces);
  int64_t chunk = first % plan.chunks;
  Sequence<kOrdered> s(p, first / plan.chunks, channel);
  for (int64_t piece = first; piece < last; ++piece) {
    int64_t t = chunk * plan.tokens_per_chunk;
    const int64_t end = min(t + plan.tokens_per_chunk, p.seqlen);
    Window<kVec> window = read_history<kVec>(p, s, t);
    Position<kOrdered> at(s, t);
    for (; t + kTokens <= end; t += kTokens) {
      walk<kVec, kTokens>(p, s, channels, qmin, at, window);
    }
#pragma unroll 1
    for (; t < end; ++t) walk<kVec, 1>(p, s, channels, qmin, at, window);
    if (++chunk == plan.chunks) {
      store_final_state(p, s, window);
      chunk = 0;
      s.advance(p);
    }
  }
}

}  // namespace mambaquant::cuda
