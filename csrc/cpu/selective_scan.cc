// selective_scan. The recurrence h = exp(dt A) h + (dt x) B per channel and state, its read-out and
// its gate.
//
// One channel per lane: the dstate states of a vector of channels are dstate vectors, so that
// neither the read-out nor the rotation of the states crosses lanes. A task owns a range of channel
// vectors of one sequence and walks it in blocks of up to 64 tokens. Per block, B and C become
// float32 once, and each channel vector goes through three loops: prepare (softplus, dequantize x),
// scan (the recurrence, 16 states in registers where dstate is 16) and finish (skip, gate, store).
// Only prepare and finish know the storage types. All steps work lane by lane and token by token,
// so that neither block borders nor the split into tasks change a bit.
//
// Bound: arithmetic. Per channel vector and state 10 micro-operations of exp2 and 3 of recurrence
// and read-out, 208 per token at two a cycle; the quantized read-out adds 5 per state, the
// rotation 4. A token moves only 7 to 13 bytes per channel. Measured (AVX-512, 2.95 GHz, dstate 16,
// operands in L1): scan 106 cycles per token and channel vector, 149 with the quantized and 200
// with the rotated read-out; prepare 26, finish 20. In the 130m layer (512 tokens) 166 in all, 90 %
// of it in these loops.
//
// Chunks (chunk_size < seqlen): pass 1 scans every chunk from state 0; the decay over a whole chunk
// is exp(A * sum dt), one exp per state. Pass 2 carries the states over the chunks, pass 3 scans
// again.
#include "mambaquant/selective_scan.h"

#include "cpu/kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kBlockStates = 1024;  // tokens * dstate of a block; 64 tokens of 16 states
static_assert(kBlockStates >= 4 * kMaxDState);
constexpr int64_t kTokenVectorsPerThread = 128;  // about 10 us of work

enum class Readout { kNone, kFloat, kInt8, kRotatedInt8 };

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
F32 load_up_to(const T* x, int64_t n) {
  return n == kLanes ? load(x) : load(x, n);
}
F32 load_or(const float* x, int64_t c, int64_t n, float otherwise) {
  return x == nullptr ? set1(otherwise) : load_up_to(x + c, n);
}
template <typename T>
void store_up_to(T* p, F32 x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store(p, x, n);
  }
}

// Tokens [begin, begin + tokens) of one sequence.
struct TokenBlock {
  int64_t batch = 0, begin = 0, tokens = 0;
  alignas(64) float B[kBlockStates];  // (tokens, dstate), dequantized
  alignas(64) float C[kBlockStates];  // as B; with a quantized read-out, C's integers
};

// A column of one operand that is wanted soon: one line per token.
struct Column {
  const char* first = nullptr;
  int64_t stride = 0;  // bytes
};

// One vector of channels within a token block.
struct ChannelBlock {
  int64_t c = 0, n = 0;  // first channel; how many, up to kLanes
  Column ahead[4];       // x, dt, y and z of the channel vector that comes next
  F32 x[kBlockTokens], dt[kBlockTokens], y[kBlockTokens];
};

// A (tokens, dstate) block of B or C to float32; scale: (dstate,), or (1,) for all states, or null.
template <typename T>
void convert_states(const void* source, int64_t stride, const float* scale, bool is_scale_shared,
                    int64_t tokens, int64_t dstate, float* out) {
  const T* row = static_cast<const T*>(source);
  for (int64_t t = 0; t < tokens; ++t, row += stride, out += dstate) {
    for (int64_t s = 0; s < dstate; s += kLanes) {
      const int64_t n = smaller(kLanes, dstate - s);
      F32 v = load_up_to(row + s, n);
      if (scale != nullptr) v = v * (is_scale_shared ? set1(*scale) : load_up_to(scale + s, n));
      store_up_to(out + s, v, n);
    }
  }
}

// Step sizes after softplus and dequantized x of a block.
template <typename DtT>
void prepare(const SelectiveScanParams& p, const TokenBlock& block, ChannelBlock* b) {
  const int64_t c = b->c, n = b->n;
  const int8_t* x = p.x + block.batch * p.x_stride_batch + block.begin * p.x_stride_token + c;
  const DtT* dt = static_cast<const DtT*>(p.dt) + block.batch * p.dt_stride_batch +
                  block.begin * p.dt_stride_token + c;
  const F32 scale = load_up_to(p.x_scale + c, n);
  const F32 zero = p.x_zero_point == nullptr ? set1(0.0f) : to_f32(load_i32(p.x_zero_point + c, n));
  const F32 bias = load_or(p.dt_bias, c, n, 0.0f);
  for (int64_t t = 0; t < block.tokens; ++t) {
    b->x[t] = (load_up_to(x + t * p.x_stride_token, n) - zero) * scale;
    b->dt[t] = softplus(load_up_to(dt + t * p.dt_stride_token, n) + bias);
  }
}

// Unnormalised Sylvester transform over kCount vectors (kCount > 0) or `count` of them.
template <int64_t kCount>
inline void hadamard_states(F32* v) {
  if constexpr (kCount > 1) {
    constexpr int64_t kHalf = kCount / 2;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kHalf; ++i) {
      const F32 a = v[i], b = v[i + kHalf];
      v[i] = a + b;
      v[i + kHalf] = a - b;
    }
    hadamard_states<kHalf>(v);
    hadamard_states<kHalf>(v + kHalf);
  }
}
inline void hadamard_states(F32* v, int64_t count) {
  for (int64_t half = 1; half < count; half *= 2) {
    for (int64_t i = 0; i < count; ++i) {
      if ((i & half) != 0) continue;
      const F32 a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
}

// acc + sum_n qh[n] * C[n] over `count` states: integers below dstate * 127 * 127 < 2^24, exact in
// float32.
inline F32 add_int8_readout(const F32* h, const float* C, int64_t count, F32 inv_scale, F32 acc) {
#pragma GCC unroll 16
  for (int64_t s = 0; s < count; ++s)
    acc = fma(quantize_symmetric(h[s], inv_scale), set1(C[s]), acc);
  return acc;
}

// sum_n h[n] * C[n] in the manner of kReadout. kDState is 0 where dstate is known at run time only.
template <int64_t kDState, Readout kReadout>
inline F32 read_out(const F32* h, const float* C, int64_t dstate, F32 inv_scale) {
  if constexpr (kReadout == Readout::kFloat) {
    constexpr int64_t kChains =
        kDState % 4 == 0 && kDState > 0 ? 4 : 1;  // hides the latency of fma
    F32 acc[kChains];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChains; ++i) acc[i] = set1(0.0f);
#pragma GCC unroll 16
    for (int64_t s = 0; s < dstate; s += kChains) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kChains; ++i) acc[i] = fma(h[s + i], set1(C[s + i]), acc[i]);
    }
    return kChains == 1 ? acc[0] : (acc[0] + acc[1]) + (acc[2 % kChains] + acc[3 % kChains]);
  } else if constexpr (kReadout == Readout::kInt8) {
    return add_int8_readout(h, C, dstate, inv_scale, set1(0.0f));
  } else if constexpr (kDState > 0) {
    // The top stage first, then each half by itself: half as many vectors alive beside h.
    constexpr int64_t kHalf = kDState / 2;
    F32 v[kHalf];
#pragma GCC unroll 16
    for (int64_t s = 0; s < kHalf; ++s) v[s] = h[s] + h[s + kHalf];
    hadamard_states<kHalf>(v);
    const F32 acc = add_int8_readout(v, C, kHalf, inv_scale, set1(0.0f));
#pragma GCC unroll 16
    for (int64_t s = 0; s < kHalf; ++s) v[s] = h[s] - h[s + kHalf];
    hadamard_states<kHalf>(v);
    return add_int8_readout(v, C + kHalf, kHalf, inv_scale, acc);
  } else {
    F32 v[kMaxDState];
    for (int64_t s = 0; s < dstate; ++s) v[s] = h[s];
    hadamard_states(v, dstate);
    return add_int8_readout(v, C, dstate, inv_scale, set1(0.0f));
  }
}

// The recurrence over a block: state_in (null: zeros) to state_out, both (dstate, dim) of one
// sequence; b->y gets the read-out.
template <int64_t kDState, Readout kReadout>
void scan(const SelectiveScanParams& p, const TokenBlock& block, const float* state_in,
          float* state_out, ChannelBlock* b) {
  constexpr int64_t kMaxStates = kDState > 0 ? kDState : kMaxDState;
  const int64_t dstate = kDState > 0 ? kDState : p.dstate;
  const int64_t c = b->c, n = b->n;
  F32 A[kMaxStates];  // times log2(e); a copy, since rows of p.A lie dim apart and may share cache
                      // sets
  F32 h[kMaxStates];
#pragma GCC unroll 16
  for (int64_t s = 0; s < dstate; ++s) {
    A[s] = load_up_to(p.A + s * p.dim + c, n) * set1(kLog2E);
    h[s] = state_in == nullptr ? set1(0.0f) : load_up_to(state_in + s * p.dim + c, n);
  }
  F32 inv_scale = set1(0.0f);
  if constexpr (kReadout == Readout::kInt8 || kReadout == Readout::kRotatedInt8) {
    inv_scale = set1(1.0f) / load_up_to(p.readout_scale + c, n);
    if (kReadout == Readout::kRotatedInt8) {
      inv_scale = inv_scale * (set1(1.0f) / sqrt(set1(static_cast<float>(dstate))));
    }
  }
  for (int64_t t = 0; t < block.tokens; ++t) {
    for (const Column& column : b->ahead) prefetch(column.first + t * column.stride);
    const float* B = block.B + t * dstate;
    const F32 dt = b->dt[t];
    const F32 dtx = dt * b->x[t];
#pragma GCC unroll 16
    for (int64_t s = 0; s < dstate; ++s) {
      h[s] = fma(exp2_product(dt, A[s]), h[s], dtx * set1(B[s]));
    }
    if constexpr (kReadout != Readout::kNone) {
      b->y[t] = read_out<kDState, kReadout>(h, block.C + t * dstate, dstate, inv_scale);
    }
  }
#pragma GCC unroll 16
  for (int64_t s = 0; s < dstate; ++s) store_up_to(state_out + s * p.dim + c, h[s], n);
}

// y *= z * sigmoid(gate_scale * z)
template <typename ZT>
void gate(const SelectiveScanParams& p, const TokenBlock& block, ChannelBlock* b) {
  const int64_t c = b->c, n = b->n;
  const ZT* z = static_cast<const ZT*>(p.z) + block.batch * p.z_stride_batch +
                block.begin * p.z_stride_token + c;
  const F32 z_scale = load_or(p.z_scale, c, n, 1.0f);
  const F32 gate_scale = load_or(p.gate_scale, c, n, 1.0f);
  for (int64_t t = 0; t < block.tokens; ++t) {
    const F32 z_f = load_up_to(z + t * p.z_stride_token, n) * z_scale;
    b->y[t] = b->y[t] * (z_f * sigmoid(gate_scale * z_f));
  }
}

// Scale of the quantized read-out, and the skip.
void add_skip(const SelectiveScanParams& p, const TokenBlock& block, ChannelBlock* b) {
  const int64_t c = b->c, n = b->n;
  const F32 scale = p.readout_scale == nullptr
                        ? set1(1.0f)
                        : load_up_to(p.readout_scale + c, n) * set1(*p.C_scale);
  const F32 D = load_or(p.D, c, n, 0.0f);
  for (int64_t t = 0; t < block.tokens; ++t) b->y[t] = fma(D, b->x[t], b->y[t] * scale);
}

template <typename YT>
void store_y(const SelectiveScanParams& p, const TokenBlock& block, const ChannelBlock& b) {
  const int64_t stride = p.reverse ? -p.dim : p.dim;
  const int64_t first = p.reverse ? p.seqlen - 1 - block.begin : block.begin;
  YT* y = static_cast<YT*>(p.y) + (block.batch * p.seqlen + first) * p.dim + b.c;
  for (int64_t t = 0; t < block.tokens; ++t) store_up_to(y + t * stride, b.y[t], b.n);
}

// The loops of a block for the types at hand, chosen once per call.
struct Loops {
  void (*convert_B)(const void*, int64_t, const float*, bool, int64_t, int64_t, float*) = nullptr;
  void (*convert_C)(const void*, int64_t, const float*, bool, int64_t, int64_t, float*) = nullptr;
  void (*prepare)(const SelectiveScanParams&, const TokenBlock&, ChannelBlock*) = nullptr;
  void (*scan)(const SelectiveScanParams&, const TokenBlock&, const float*, float*,
               ChannelBlock*) = nullptr;
  void (*scan_without_readout)(const SelectiveScanParams&, const TokenBlock&, const float*, float*,
                               ChannelBlock*) = nullptr;
  void (*gate)(const SelectiveScanParams&, const TokenBlock&, ChannelBlock*) = nullptr;
  void (*store_y)(const SelectiveScanParams&, const TokenBlock&, const ChannelBlock&) = nullptr;
};

template <int64_t kDState>
void choose_scan(const SelectiveScanParams& p, Loops* loops) {
  loops->scan_without_readout = &scan<kDState, Readout::kNone>;
  if (p.readout_scale == nullptr) {
    loops->scan = &scan<kDState, Readout::kFloat>;
  } else if (p.rotate_state) {
    loops->scan = &scan<kDState, Readout::kRotatedInt8>;
  } else {
    loops->scan = &scan<kDState, Readout::kInt8>;
  }
}

Status choose_loops(const SelectiveScanParams& p, Loops* loops) {
  if (p.dstate == 16) {
    choose_scan<16>(p, loops);
  } else {
    choose_scan<0>(p, loops);
  }
  const auto choose = [](auto* slot, auto function) {
    *slot = function;
    return Status::ok();
  };
  Status status = MBQ_DISPATCH_FLOAT_OR_INT8(p.B_dtype, [&](auto tag) {
    return choose(&loops->convert_B, &convert_states<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  status = MBQ_DISPATCH_FLOAT_OR_INT8(p.C_dtype, [&](auto tag) {
    return choose(&loops->convert_C, &convert_states<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  status = MBQ_DISPATCH_FLOAT(p.dt_dtype, [&](auto tag) {
    return choose(&loops->prepare, &prepare<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  status = MBQ_DISPATCH_FLOAT_OR_INT8(p.z_dtype, [&](auto tag) {
    return choose(&loops->gate, &gate<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  return MBQ_DISPATCH_FLOAT(p.y_dtype, [&](auto tag) {
    return choose(&loops->store_y, &store_y<typename decltype(tag)::type>);
  });
}

// Channels [c_begin, c_end) of one sequence over tokens [begin, end).
struct Stretch {
  int64_t batch, begin, end, c_begin, c_end;
  const float* state_in;  // (dstate, dim) or null
  float* state_out;       // (dstate, dim)
  float* dt_sum;          // (dim,): pass 1, no read-out; null: write y
};

int64_t size_of(DType dtype) { return dtype == DType::kI8 ? 1 : dtype == DType::kF32 ? 4 : 2; }

const void* element(const void* p, DType dtype, int64_t index) {
  return static_cast<const char*>(p) + index * size_of(dtype);
}

void convert_block(const SelectiveScanParams& p, const Loops& loops, bool with_C,
                   TokenBlock* block) {
  const void* B =
      element(p.B, p.B_dtype, block->batch * p.B_stride_batch + block->begin * p.B_stride_token);
  loops.convert_B(B, p.B_stride_token, p.B_scale, false, block->tokens, p.dstate, block->B);
  if (!with_C) return;
  const void* C =
      element(p.C, p.C_dtype, block->batch * p.C_stride_batch + block->begin * p.C_stride_token);
  const float* scale = p.readout_scale == nullptr ? p.C_scale : nullptr;
  loops.convert_C(C, p.C_stride_token, scale, true, block->tokens, p.dstate, block->C);
}

void add_steps(const TokenBlock& block, const ChannelBlock& b, bool is_first, float* dt_sum) {
  F32 sum = is_first ? set1(0.0f) : load_up_to(dt_sum + b.c, b.n);
  for (int64_t t = 0; t < block.tokens; ++t) sum = sum + b.dt[t];
  store_up_to(dt_sum + b.c, sum, b.n);
}

// NOTE(prefetch): a vector of channels reads one line of every token's row. Rows lie further apart
// than the hardware prefetchers look, so that each such line would be waited for; the scan has
// instruction slots to spare and fetches the lines of the next vector meanwhile.
void aim_ahead(const SelectiveScanParams& p, const TokenBlock& block, int64_t c, ChannelBlock* b) {
  const auto column = [&](const void* base, DType dtype, int64_t stride_batch,
                          int64_t stride_token) {
    const int64_t size = size_of(dtype);
    const int64_t offset = block.batch * stride_batch + block.begin * stride_token + c;
    return Column{static_cast<const char*>(base) + offset * size, stride_token * size};
  };
  b->ahead[0] = column(p.x, DType::kI8, p.x_stride_batch, p.x_stride_token);
  b->ahead[1] = column(p.dt, p.dt_dtype, p.dt_stride_batch, p.dt_stride_token);
  b->ahead[2] =
      p.z == nullptr ? b->ahead[1] : column(p.z, p.z_dtype, p.z_stride_batch, p.z_stride_token);
  const int64_t y_row =
      block.batch * p.seqlen + (p.reverse ? p.seqlen - 1 - block.begin : block.begin);
  const int64_t size = size_of(p.y_dtype);
  b->ahead[3] = Column{static_cast<const char*>(p.y) + (y_row * p.dim + c) * size,
                       (p.reverse ? -p.dim : p.dim) * size};
}

void run_stretch(const SelectiveScanParams& p, const Loops& loops, const Stretch& s) {
  const int64_t block_tokens = smaller(kBlockTokens, kBlockStates / p.dstate);
  TokenBlock block;
  ChannelBlock b;
  block.batch = s.batch;
  for (block.begin = s.begin; block.begin < s.end; block.begin += block_tokens) {
    block.tokens = smaller(block_tokens, s.end - block.begin);
    convert_block(p, loops, s.dt_sum == nullptr, &block);
    const bool is_first = block.begin == s.begin;
    const float* state_in = is_first ? s.state_in : s.state_out;
    for (b.c = s.c_begin; b.c < s.c_end; b.c += kLanes) {
      b.n = smaller(kLanes, s.c_end - b.c);
      loops.prepare(p, block, &b);
      aim_ahead(p, block, b.c + kLanes, &b);
      if (s.dt_sum != nullptr) {
        loops.scan_without_readout(p, block, state_in, s.state_out, &b);
        add_steps(block, b, is_first, s.dt_sum);
        continue;
      }
      loops.scan(p, block, state_in, s.state_out, &b);
      add_skip(p, block, &b);
      if (p.z != nullptr) loops.gate(p, block, &b);
      loops.store_y(p, block, b);
    }
  }
}

// Calls f(item, c_begin, c_end) for items [0, items), each with the whole or a part of its
// channels.
template <typename F>
void for_items(const SelectiveScanParams& p, const Threads& threads, int64_t items, int64_t tokens,
               const F& f) {
  const int64_t vectors = (p.dim + kLanes - 1) / kLanes;
  const int64_t grain = kTokenVectorsPerThread / (tokens + 1) + 1;
  threads.parallel_for(items * vectors, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t item = first / vectors;
      const int64_t stop = smaller(last, (item + 1) * vectors);
      const int64_t c_end = smaller((stop - item * vectors) * kLanes, p.dim);
      f(item, (first - item * vectors) * kLanes, c_end);
      first = stop;
    }
  });
}

struct Chunks {
  int64_t count, size;
  float* state;   // (batch, count, dstate, dim): a chunk's local end state, then its initial state
  float* dt_sum;  // (batch, count, dim)
};

// Pass 2. The last chunk was not scanned: its local state and sum are never read.
void carry_states(const SelectiveScanParams& p, const Chunks& chunks, int64_t batch,
                  int64_t c_begin, int64_t c_end) {
  const int64_t states = p.dstate * p.dim;
  for (int64_t c = c_begin; c < c_end; c += kLanes) {
    const int64_t n = smaller(kLanes, c_end - c);
    for (int64_t s = 0; s < p.dstate; ++s) {
      const int64_t row = s * p.dim + c;
      const F32 A = load_up_to(p.A + row, n) * set1(kLog2E);
      F32 h = load_or(p.initial_state, batch * states + row, n, 0.0f);
      for (int64_t k = 0; k < chunks.count; ++k) {
        float* slot = chunks.state + (batch * chunks.count + k) * states + row;
        if (k + 1 < chunks.count) {
          const F32 dt_sum = load_up_to(chunks.dt_sum + (batch * chunks.count + k) * p.dim + c, n);
          const F32 next = fma(exp2_product(dt_sum, A), h, load_up_to(slot, n));
          store_up_to(slot, h, n);
          h = next;
        } else {
          store_up_to(slot, h, n);
        }
      }
    }
  }
}

void scan_chunks(const SelectiveScanParams& p, const Loops& loops, const Threads& threads) {
  Chunks chunks;
  chunks.size = p.chunk_size;
  chunks.count = (p.seqlen + p.chunk_size - 1) / p.chunk_size;
  chunks.state = p.workspace;
  chunks.dt_sum = p.workspace + p.batch * chunks.count * p.dstate * p.dim;
  const auto stretch_of = [&](int64_t item, int64_t c_begin, int64_t c_end) {
    const int64_t begin = item % chunks.count * chunks.size;
    float* state = chunks.state + item * p.dstate * p.dim;
    return Stretch{item / chunks.count,
                   begin,
                   smaller(begin + chunks.size, p.seqlen),
                   c_begin,
                   c_end,
                   state,
                   state,
                   nullptr};
  };
  const int64_t items = p.batch * chunks.count;
  for_items(p, threads, items, chunks.size, [&](int64_t item, int64_t c_begin, int64_t c_end) {
    if (item % chunks.count == chunks.count - 1) return;
    Stretch s = stretch_of(item, c_begin, c_end);
    s.state_in = nullptr;
    s.dt_sum = chunks.dt_sum + item * p.dim;
    run_stretch(p, loops, s);
  });
  for_items(p, threads, p.batch, chunks.count, [&](int64_t batch, int64_t c_begin, int64_t c_end) {
    carry_states(p, chunks, batch, c_begin, c_end);
  });
  for_items(p, threads, items, chunks.size, [&](int64_t item, int64_t c_begin, int64_t c_end) {
    Stretch s = stretch_of(item, c_begin, c_end);
    if (s.end == p.seqlen) s.state_out = p.final_state + s.batch * p.dstate * p.dim;
    run_stretch(p, loops, s);
  });
}

// No tokens: the state passes through.
void copy_state(const SelectiveScanParams& p) {
  const int64_t count = p.batch * p.dstate * p.dim;
  for (int64_t i = 0; i < count; ++i) {
    p.final_state[i] = p.initial_state == nullptr ? 0.0f : p.initial_state[i];
  }
}

// Walking backwards is walking forwards with the strides turned round; store_y turns y.
void reverse_inputs(SelectiveScanParams* p) {
  const int64_t last = p->seqlen - 1;
  p->x += last * p->x_stride_token;
  p->dt = element(p->dt, p->dt_dtype, last * p->dt_stride_token);
  p->B = element(p->B, p->B_dtype, last * p->B_stride_token);
  p->C = element(p->C, p->C_dtype, last * p->C_stride_token);
  if (p->z != nullptr) p->z = element(p->z, p->z_dtype, last * p->z_stride_token);
  p->x_stride_token = -p->x_stride_token;
  p->dt_stride_token = -p->dt_stride_token;
  p->B_stride_token = -p->B_stride_token;
  p->C_stride_token = -p->C_stride_token;
  p->z_stride_token = -p->z_stride_token;
}

}  // namespace

Status selective_scan(const SelectiveScanParams& params, const Threads& threads) {
  SelectiveScanParams p = params;
  if (p.dstate > kMaxDState) return Status::unsupported("expected dstate of at most 256");
  Loops loops;
  const Status status = choose_loops(p, &loops);
  if (!status.is_ok()) return status;
  if (p.seqlen == 0) {
    copy_state(p);
    return Status::ok();
  }
  if (p.reverse) reverse_inputs(&p);
  if (p.chunk_size < p.seqlen) {
    scan_chunks(p, loops, threads);
    return Status::ok();
  }
  for_items(p, threads, p.batch, p.seqlen, [&](int64_t batch, int64_t c_begin, int64_t c_end) {
    const int64_t offset = batch * p.dstate * p.dim;
    const float* state_in = p.initial_state == nullptr ? nullptr : p.initial_state + offset;
    run_stretch(p, loops,
                {batch, 0, p.seqlen, c_begin, c_end, state_in, p.final_state + offset, nullptr});
  });
  return Status::ok();
}

}  // namespace mambaquant::cpu::MBQ_ISA
