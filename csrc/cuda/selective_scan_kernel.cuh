// selective_scan with 16 states: mambaquant/selective_scan.h has the formula.
//
// A thread walks one channel, its 16 states and 16 A in registers; 64 threads share a tile in shared
// memory (selective_scan_tile.cuh) and do with it: load (softplus), scan, store (skip, gate).
//   kChunks = 1: a block walks the whole sequence, tile by tile.
//   kChunks = 4: a block takes four chunks of the sequence at once, a tile each. Pass 1 scans every chunk
//   from state 0; the decay over a chunk is 2^(A sum dt), so that the chunks are joined in shared memory,
//   and the blocks of a sequence in a chain: a block waits for the state that its predecessor ends with,
//   passes on its own, and then scans again, now with the read-out, what still lies in shared memory.
//   Blocks take their places by a ticket, so that whoever waits, waits for one that runs already.
//
// A routed walk (an order, or an addend) looks up the tokens of a tile once, which costs 2 % more instructions; a
// walk without is compiled apart and has none of it.
//
// Bound: instructions, and 2^x within them: per (token, channel, state) 5 to 12 and what they share
// (docs/design/0009 has the counts), pass 1 4.7 more. Bytes, per (token, channel): dt, x, z and y once,
// B and C once for 64 channels (1/2), A, scales and states once for a block of 256 tokens (220/256).
#pragma once

#include "cuda/common/sync.cuh"
#include "cuda/selective_scan_tile.cuh"

namespace mambaquant::cuda {

struct ScanPlan {
  int32_t chunk_tokens;  // of a tile
  int32_t groups;        // of a tile, ceil(chunk_tokens / 4)
  int64_t blocks;        // of a sequence; 1: no chain
  int64_t tiles;         // of 64 channels
  uint32_t vectors;      // VectorOperand
};

// The chain's memory: a ticket counter and a flag for each block, all 0 at first; then, a block after
// another, the states (kStates, kTileChannels) that it ends with.
struct ScanChain {
  uint32_t* ticket;
  uint32_t* flags;
  float* states;
};
inline constexpr int64_t kTileStates = kStates * kTileChannels;

// Between the chunks of a block: A at first, then what a chunk hands to the next.
struct CarrySlots {
  float state[kStates][kTileChannels];
  float steps[kTileChannels];
  uint32_t ticket;
};

template <Readout kReadout, bool kRouted>
using ScanGroup = TileGroup<typename ReadoutRow<kReadout>::type, kRouted>;

template <Readout kReadout, bool kRouted>
constexpr int64_t scan_shared_bytes(int32_t chunks, int32_t groups) {
  const int64_t tile = groups * static_cast<int64_t>(sizeof(ScanGroup<kReadout, kRouted>));
  return static_cast<int64_t>(sizeof(ScanScales)) + chunks * tile +
         (chunks > 1 ? static_cast<int64_t>(sizeof(CarrySlots)) : 0);
}

// A thread's channel.
struct ScanChannel {
  int32_t c;  // within the tile
  bool exists;
  int64_t state_offset;  // of state 0
  float A[kStates];      // in units of log2(e)
  float h[kStates];
  InputScale input;
  Skip skip;
  float inv_readout_scale;
};

__device__ inline void load_A(const SelectiveScanParams& p, const TilePlace& place,
                              ScanChannel& channel) {
  load_state(p.A + place.c + (channel.exists ? channel.c : 0), p.dim, channel.A);
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) channel.A[n] *= kLog2E;
}
__device__ inline void take_scales(const ScanScales& scales, ScanChannel& channel) {
  const int32_t c = channel.c;
  channel.input = {scales.x_zero[c], scales.x_scale[c]};
  channel.skip = {scales.D[c], scales.readout[c]};
  channel.inv_readout_scale = scales.inv_readout[c];
}

// One channel over a tile: advances its states; pass 2 puts y, before the gate, in the place of the steps,
// pass 1 returns their sum.
template <Readout kReadout, bool kReadsOut, bool kRouted>
__device__ inline float scan_tile(ScanGroup<kReadout, kRouted>* tile, int32_t groups,
                                  ScanChannel& channel) {
  const int32_t slot = slot_of(channel.c);
  float sum = 0.0f;
  for (const ScanGroup<kReadout, kRouted>* end = tile + groups; tile != end; ++tile) {
    const float4 four = steps_at(tile, slot);
    const float dt[kGroup] = {four.x, four.y, four.z, four.w};
    float x_f[kGroup], y[kGroup];
    shifted_bytes(tile->x[channel.c], x_f);
#pragma unroll
    for (int32_t t = 0; t < kGroup; ++t) {
      x_f[t] = channel.input(x_f[t]);
      advance(channel.h, channel.A, tile->B[t], dt[t], __fmul_rn(dt[t], x_f[t]));
      if constexpr (kReadsOut) {
        const float read = read_out<kReadout>(channel.h, tile->C[t], channel.inv_readout_scale);
        y[t] = channel.skip.template apply<kReadout>(read, x_f[t]);
      } else {
        sum += dt[t];
      }
    }
    if constexpr (kReadsOut) steps_at(tile, slot) = {y[0], y[1], y[2], y[3]};
  }
  return sum;
}

// rows = 2^(A steps) h + rows
__device__ inline void decay_onto(const float (&A)[kStates], float steps, const float (&h)[kStates],
                                  float (&rows)[kStates]) {
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) rows[n] = fmaf(exp2_approx(steps * A[n]), h[n], rows[n]);
}

__device__ inline void put_state(const float (&h)[kStates], int32_t c, CarrySlots* carry) {
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) carry->state[n][c] = h[n];
}
__device__ inline void take_state(const CarrySlots& carry, int32_t c, float (&h)[kStates]) {
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) h[n] = carry.state[n][c];
}

// What a thread knows of a block that starts from state 0: the states before its chunk and the sum of the
// steps up to there; channel.h and `steps_after` count the chunk too.
struct BlockPrefix {
  float before[kStates];
  float steps_before, steps_after;
};

// channel.h: the states that the chunk ends with when it starts from 0, after `steps` in all.
template <int32_t kChunks>
__device__ inline BlockPrefix join_chunks(int32_t chunk, float steps, CarrySlots* carry,
                                          ScanChannel& channel) {
  BlockPrefix prefix;
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) prefix.before[n] = 0.0f;
  prefix.steps_before = 0.0f;
  for (int32_t k = 0; k < kChunks; ++k) {
    if (k == chunk) {
      if (k > 0) {
        take_state(*carry, channel.c, prefix.before);
        prefix.steps_before = carry->steps[channel.c];
      }
      prefix.steps_after = prefix.steps_before + steps;
      decay_onto(channel.A, steps, prefix.before, channel.h);
      put_state(channel.h, channel.c, carry);
      carry->steps[channel.c] = prefix.steps_after;
    }
    __syncthreads();
  }
  return prefix;
}

// The chain: waits for the states that the block before ends with, passes on those of this block, and leaves
// what it starts with in shared memory. The last chunk's threads hold what the block adds.
template <int32_t kChunks>
__device__ inline void link_blocks(const SelectiveScanParams& p, const ScanPlan& plan,
                                   const ScanChain& chain, int64_t sequence, int64_t block,
                                   int32_t chunk, const BlockPrefix& prefix, CarrySlots* carry,
                                   ScanChannel& channel) {
  const int64_t link = sequence * plan.blocks + block;
  const bool is_last = block + 1 == plan.blocks;
  if (block > 0) {
    if (threadIdx.x == 0) {
      while (load_acquire(chain.flags + link - 1) == 0) __nanosleep(40);
    }
    __syncthreads();
  }
  if (chunk == kChunks - 1) {
    float start[kStates];
    if (block > 0) {
      load_state(chain.states + (link - 1) * kTileStates + channel.c, kTileChannels, start);
    } else {
      load_initial_state(p, channel.state_offset, p.dim, start);
    }
    put_state(start, channel.c, carry);
    if (!is_last) {
      decay_onto(channel.A, prefix.steps_after, start, channel.h);
      store_state(chain.states + link * kTileStates + channel.c, kTileChannels, channel.h);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && !is_last) {
    __threadfence();
    store_release(chain.flags + link, 1);
  }
}

// The first blocks of all sequences come first.
__device__ inline int64_t take_place(const ScanChain& chain, const ScanPlan& plan,
                                     CarrySlots* carry) {
  if (plan.blocks == 1) return blockIdx.x;
  if (threadIdx.x == 0) carry->ticket = atomicAdd(chain.ticket, 1);
  __syncthreads();
  return carry->ticket;
}

// Four chunks at once, a tile each.
template <Readout kReadout, int32_t kChunks, bool kRouted>
__device__ inline void scan_chunks(const SelectiveScanParams& p, const ScanPlan& plan,
                                   const ScanChain& chain, const ScanScales& scales,
                                   int64_t sequence, int64_t block, TilePlace place,
                                   ScanGroup<kReadout, kRouted>* tile, CarrySlots* carry,
                                   ScanChannel& channel) {
  const int32_t chunk = static_cast<int32_t>(threadIdx.x) / kTileChannels;
  if (chunk == 0) {
    load_A(p, place, channel);
    put_state(channel.A, channel.c, carry);
  }
  place.token = (block * kChunks + chunk) * plan.chunk_tokens;
  const int64_t left = p.seqlen - place.token;
  place.tokens =
      static_cast<int32_t>(max(min(left, static_cast<int64_t>(plan.chunk_tokens)), int64_t{0}));
  if constexpr (kRouted) load_tokens(p, place, tile);
  __syncthreads();
  take_scales(scales, channel);
  ThreadColumn<kRouted> column(p, place);
  ThreadRows<kRouted> rows(p, place);
  load_channels(p, place, scales, tile, column);
  load_state_rows(p, place, scales, tile, rows);
  take_state(*carry, channel.c, channel.A);
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) channel.h[n] = 0.0f;
  __syncthreads();
  const int32_t groups = (place.tokens + kGroup - 1) / kGroup;
  const float steps = scan_tile<kReadout, false, kRouted>(tile, groups, channel);
  const BlockPrefix prefix = join_chunks<kChunks>(chunk, steps, carry, channel);
  link_blocks<kChunks>(p, plan, chain, sequence, block, chunk, prefix, carry, channel);
  // The states that this chunk starts with, and the scan proper.
  float start[kStates];
  take_state(*carry, channel.c, start);
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) channel.h[n] = prefix.before[n];
  decay_onto(channel.A, prefix.steps_before, start, channel.h);
  scan_tile<kReadout, true, kRouted>(tile, groups, channel);
  __syncthreads();
  store_channels(p, place, scales, tile, column);
  if (block + 1 == plan.blocks && chunk == kChunks - 1 && channel.exists) {
    store_state(p.final_state + channel.state_offset, p.dim, channel.h);
  }
}

// The whole sequence, a tile after another.
template <Readout kReadout, bool kRouted>
__device__ inline void scan_sequence(const SelectiveScanParams& p, const ScanPlan& plan,
                                     const ScanScales& scales, TilePlace place,
                                     ScanGroup<kReadout, kRouted>* tile, ScanChannel& channel) {
  load_A(p, place, channel);
  load_initial_state(p, channel.state_offset, p.dim, channel.h);
  __syncthreads();
  take_scales(scales, channel);
  place.token = 0;
  ThreadColumn<kRouted> column(p, place);
  ThreadRows<kRouted> rows(p, place);
  for (int64_t left = p.seqlen; left > 0; left -= plan.chunk_tokens) {
    place.tokens = static_cast<int32_t>(min(left, static_cast<int64_t>(plan.chunk_tokens)));
    place.groups = (place.tokens + kGroup - 1) / kGroup;
    if constexpr (kRouted) {
      place.token = p.seqlen - left;
      __syncthreads();  // the tile before is stored
      load_tokens(p, place, tile);
      __syncthreads();
    }
    load_channels(p, place, scales, tile, column);
    load_state_rows(p, place, scales, tile, rows);
    __syncthreads();
    scan_tile<kReadout, true, kRouted>(tile, place.groups, channel);
    __syncthreads();
    store_channels(p, place, scales, tile, column);
  }
  if (channel.exists) store_state(p.final_state + channel.state_offset, p.dim, channel.h);
}

// kRouted: the walk has an order or an addend. Without, rows lie a stride apart, and nothing is looked up.
template <Readout kReadout, int32_t kChunks, bool kRouted>
__global__ void __launch_bounds__(kTileChannels* kChunks, kChunks == 1 ? 6 : 2)
    scan_kernel(const __grid_constant__ SelectiveScanParams p, const ScanPlan plan,
                const ScanChain chain) {
  extern __shared__ __align__(16) char memory[];
  auto* scales = reinterpret_cast<ScanScales*>(memory);
  auto* tiles = reinterpret_cast<ScanGroup<kReadout, kRouted>*>(memory + sizeof(ScanScales));
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  auto* tile = tiles + thread / kTileChannels * plan.groups;
  auto* carry = reinterpret_cast<CarrySlots*>(tiles + kChunks * plan.groups);

  const int64_t sequences = p.batch * plan.tiles;
  const int64_t index = kChunks == 1 ? blockIdx.x : take_place(chain, plan, carry);
  const int64_t sequence = index % sequences;
  const int64_t block = index / sequences;
  TilePlace place;
  place.batch = sequence / plan.tiles;
  place.c = sequence % plan.tiles * kTileChannels;
  place.channels = static_cast<int32_t>(min(p.dim - place.c, static_cast<int64_t>(kTileChannels)));
  place.thread = thread % kTileChannels;
  place.groups = plan.groups;
  place.vectors = plan.vectors;

  // A thread beyond the last channel works on the first of the tile, and stores nothing.
  ScanChannel channel;
  channel.c = place.thread;
  channel.exists = channel.c < place.channels;
  const int64_t c = place.c + (channel.exists ? channel.c : 0);
  channel.state_offset = place.batch * kStates * p.dim + c;
  if (thread < kTileChannels) load_scales(p, c, thread, scales);
  if constexpr (kChunks == 1) {
    scan_sequence<kReadout, kRouted>(p, plan, *scales, place, tile, channel);
  } else {
    scan_chunks<kReadout, kChunks, kRouted>(p, plan, chain, *scales, sequence, block, place, tile,
                                            carry, channel);
  }
}

}  // namespace mambaquant::cuda
