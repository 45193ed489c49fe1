// One block of selective_scan: a vector of channels over a few tokens, or, where a call has one token,
// several vectors of channels over that.
//
// One channel per lane: the dstate states of a vector of channels are dstate vectors, so that
// neither the read-out nor the rotation of the states crosses lanes. A block goes through three
// loops: prepare (softplus, dequantize x), scan (the recurrence and the read-out, 16 states in registers
// where dstate is 16) and finish (gate, store). Only prepare and finish know the storage types.
//
// Bound: arithmetic. Per channel vector and state 7 instructions of exp2 and 3 of the recurrence; the read-out
// adds 1, quantized 3, and the rotation 4. Where multipliers and adders are apart (Zen 5, two of each, and two
// slots for the scaling of exp2) 112 of the recurrence's 176 slots a token are multiplications, 56 cycles, and
// all of it with the rotated read-out is 288 slots, 72 cycles; on two ports for both it is 136. prepare has 29
// and finish 15 more, 11 cycles. A token moves only 7 to 13 bytes per channel.
// Measured (AVX-512, Zen 5, dstate 16, operands in L1), cycles per token and channel vector: recurrence 65
// (86 % of its bound), with the float read-out 75, the quantized 82, the rotated 103 (70 %); prepare 14,
// finish 7. In the 130m layer, blocks of 128 tokens: 129 in all, and 147 for a token alone.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/simd/quant.h"
#include "mambaquant/selective_scan.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kBlockStates = 1024;  // tokens * dstate of a block at most
static_assert(kBlockStates >= 4 * kMaxDState);

enum class Readout { kNone, kFloat, kInt8, kRotatedInt8 };

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

F32 load_or(const float* x, int64_t c, int64_t n, float otherwise) {
  return x == nullptr ? set1(otherwise) : load_up_to(x + c, n);
}
// Steps [begin, begin + tokens) of the walk over one sequence.
struct TokenBlock {
  int64_t batch = 0, begin = 0, tokens = 0;
  alignas(64) float B[kBlockStates];  // (tokens, dstate), dequantized
  alignas(64) float C[kBlockStates];  // as B; float read-out
  // (tokens, dstate and one more where that is odd), C's integers; quantized read-out
  alignas(64) int16_t C_words[kBlockStates + kBlockTokens];
  int64_t token[kBlockTokens];  // where in storage each step is
};

// A column of one operand that is wanted soon: one line per token.
struct Column {
  const char* first = nullptr;  // of token 0
  int64_t stride = 0;           // bytes
};

// What the loops of a block work on: `tokens` items of one vector of channels, or, where the block has
// one token, an item in each of `vectors` whole vectors of channels. Either way they are independent but
// for the state, so that the latency of one is hidden behind the others.
struct ChannelBlock {
  int64_t c = 0, c_end = 0;  // channels
  int64_t vectors = 1;
  Column ahead[4];  // x, dt, y, and z of the channel vector that comes next
  F32 x[kBlockTokens], dt[kBlockTokens], y[kBlockTokens];
};

// The number of lanes of a whole vector, where the compiler should know it.
struct Whole {
  constexpr operator int64_t() const { return kLanes; }
};

// Calls f(c, lanes, item) for every vector of channels, where `item` is its first.
template <typename F>
inline void for_vectors(const ChannelBlock& b, const F& f) {
  if (b.c_end - b.c < kLanes) return f(b.c, b.c_end - b.c, 0);
  for (int64_t i = 0; i < b.vectors; ++i) f(b.c + i * kLanes, Whole{}, i);
}

// A (tokens, dstate) block of B or C, from the rows `block.token` of `source`, to float32; scale:
// (dstate,), or (1,) for all states, or null.
template <typename T>
void convert_states(const T* source, int64_t stride, const TokenBlock& block, const float* scale,
                    bool is_scale_shared, int64_t dstate, float* out) {
  for (int64_t t = 0; t < block.tokens; ++t, out += dstate) {
    const T* row = source + block.token[t] * stride;
    for (int64_t s = 0; s < dstate; s += kLanes) {
      const int64_t n = smaller(kLanes, dstate - s);
      F32 v = load_up_to(row + s, n);
      if (scale != nullptr) v = v * (is_scale_shared ? set1(*scale) : load_up_to(scale + s, n));
      store_up_to(out + s, v, n);
    }
  }
}
template <typename T>
void convert_B(const SelectiveScanParams& p, TokenBlock* block) {
  const T* B = static_cast<const T*>(p.B) + block->batch * p.B_stride_batch;
  convert_states(B, p.B_stride_token, *block, p.B_scale, false, p.dstate, block->B);
}
template <typename T>
void convert_C(const SelectiveScanParams& p, TokenBlock* block) {
  const T* C = static_cast<const T*>(p.C) + block->batch * p.C_stride_batch;
  convert_states(C, p.C_stride_token, *block, p.C_scale, true, p.dstate, block->C);
}

int64_t words_of(int64_t dstate) { return dstate + (dstate & 1); }

void widen_C(const SelectiveScanParams& p, TokenBlock* block) {
  const int8_t* C = static_cast<const int8_t*>(p.C) + block->batch * p.C_stride_batch;
  const int64_t dstate = p.dstate, words = words_of(dstate);
  for (int64_t t = 0; t < block->tokens; ++t) {
    const int8_t* row = C + block->token[t] * p.C_stride_token;
    int16_t* out = block->C_words + t * words;
    for (int64_t s = 0; s < dstate; ++s) out[s] = row[s];
    if (words > dstate) out[dstate] = 0;
  }
}

// Step sizes after softplus and dequantized x of a block.
template <typename DtT>
void prepare(const SelectiveScanParams& p, const TokenBlock& block, ChannelBlock* b) {
  const int64_t x_stride = p.x_stride_token, dt_stride = p.dt_stride_token;
  for_vectors(*b, [&](int64_t c, auto n, int64_t item) {
    const int8_t* x = p.x + block.batch * p.x_stride_batch + c;
    const DtT* dt = static_cast<const DtT*>(p.dt) + block.batch * p.dt_stride_batch + c;
    const F32 scale = load_up_to(p.x_scale + c, n);
    const F32 zero =
        p.x_zero_point == nullptr ? set1(0.0f) : to_f32(load_i32_up_to(p.x_zero_point + c, n));
    const F32 bias = load_or(p.dt_bias, c, n, 0.0f);
    for (int64_t t = 0; t < block.tokens; ++t, ++item) {
      const int64_t token = block.token[t];
      b->x[item] = (load_up_to(x + token * x_stride, n) - zero) * scale;
      b->dt[item] = softplus(load_up_to(dt + token * dt_stride, n) + bias);
    }
  });
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
// Its stages of stride kCount / 2 down to kStride alone. Sums of the first one are made by multipliers,
// which have less to do here than adders where a processor has both.
template <int64_t kCount, int64_t kStride>
inline void hadamard_strides(F32* v) {
  if constexpr (kCount > kStride) {
    constexpr int64_t kHalf = kCount / 2;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kHalf; ++i) {
      const F32 a = v[i], b = v[i + kHalf];
      v[i] = fma(a, set1(1.0f), b);
      v[i + kHalf] = a - b;
    }
    hadamard_strides<kHalf, kStride>(v);
    hadamard_strides<kHalf, kStride>(v + kHalf);
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

// How states become integers, and their sums of products with C's integers y again.
struct Rounding {
  Rounding(const SelectiveScanParams& p, int64_t c, int64_t n)
      : factor(set1(0.0f)), limit(set1(0.0f)), scale(set1(0.0f)) {
    if (p.readout_scale == nullptr) return;
    const F32 readout_scale = load_up_to(p.readout_scale + c, n);
    const F32 norm = sqrt(set1(p.rotate_state ? static_cast<float>(p.dstate) : 1.0f));
    factor = (set1(1.0f) / readout_scale) * (set1(1.0f) / norm);
    limit = readout_scale * norm * set1(static_cast<float>(kQMax));
    scale = readout_scale * set1(*p.C_scale);
  }

  // clamp(rne(h * factor), -127, 127) in the low word: adding 1.5 * 2^23 leaves the nearest integer in the
  // last bits.
  I32 round(F32 h) const {
    return bits_of(fma(clamp_magnitude(h, limit), factor, set1(12582912.0f)));
  }

  F32 factor, limit, scale;
};

// sums[.] + sum_n qh[n] * C[n] over `count` states, a multiple of 2; exact.
inline void add_int8_readout(const F32* h, const int16_t* C, int64_t count,
                             const Rounding& rounding, I32 (&sums)[2]) {
#pragma GCC unroll 16
  for (int64_t s = 0; s < count; s += 2) {
    const Pairs qh = join_low_words(rounding.round(h[s]), rounding.round(h[s + 1]));
    sums[s / 2 % 2] = dot(sums[s / 2 % 2], qh, set1_pairs(C + s));
  }
}

// sum_n h[n] * C[n]. kDState is 0 where dstate is known at run time only.
template <int64_t kDState>
inline F32 read_out(const F32* h, const float* C, int64_t dstate) {
  constexpr int64_t kChains = kDState % 4 == 0 && kDState > 0 ? 4 : 1;  // hides the latency of fma
  F32 acc[kChains];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kChains; ++i) acc[i] = set1(0.0f);
#pragma GCC unroll 16
  for (int64_t s = 0; s < dstate; s += kChains) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChains; ++i) acc[i] = fma(h[s + i], set1(C[s + i]), acc[i]);
  }
  return kChains == 1 ? acc[0] : (acc[0] + acc[1]) + (acc[2 % kChains] + acc[3 % kChains]);
}

// y before skip and gate: sum_n qh[n] * C[n], scaled.
template <int64_t kDState, bool kRotate>
inline F32 read_out_int8(const F32* h, const int16_t* C, int64_t dstate, const Rounding& rounding) {
  I32 sums[2] = {set1_i32(0), set1_i32(0)};
  if constexpr (kDState > 0 && !kRotate) {
    add_int8_readout(h, C, kDState, rounding, sums);
  } else if constexpr (kDState > 0) {
    // Strides 4 and above first, then groups of four, each of which is rounded at once.
    F32 v[kDState];
#pragma GCC unroll 16
    for (int64_t s = 0; s < kDState; ++s) v[s] = h[s];
    hadamard_strides<kDState, 4>(v);
#pragma GCC unroll 16
    for (int64_t s = 0; s < kDState; s += 4) {
      hadamard_states<4>(v + s);
      add_int8_readout(v + s, C + s, 4, rounding, sums);
    }
  } else {
    F32 v[kMaxDState + 1];
    for (int64_t s = 0; s < dstate; ++s) v[s] = h[s];
    if (kRotate) hadamard_states(v, dstate);
    v[dstate] = set1(0.0f);
    add_int8_readout(v, C, words_of(dstate), rounding, sums);
  }
  return to_f32(sums[0] + sums[1]) * rounding.scale;
}

// One step of the recurrence.
struct Step {
  Step(const float* B_item, F32 dt, F32 x) : B(B_item), dtx(dt * x), dt_log2e(dt * set1(kLog2E)) {}

  F32 next(F32 h, F32 A, int64_t s) const {
    const Exp2 decay = exp2_product(dt_log2e, A);
    return fma(h * decay.steps, decay.rest, dtx * set1(B[s]));
  }

  const float* B;
  F32 dtx, dt_log2e;
};

// NOTE(history): exp2 keeps the multipliers busy and the rotation the adders, but a processor's window
// is too small to see both at once; token by token they take longer than one after the other. The states
// of a few items are therefore kept and rotated together.
constexpr int64_t kHistory = 8;

template <int64_t kDState>
struct History {
  alignas(64) float states[kHistory][kDState > 0 ? kDState * kLanes : 1];

  void keep(int64_t item, const F32* h) {
#pragma GCC unroll 16
    for (int64_t s = 0; s < kDState; ++s) store(states[item % kHistory] + s * kLanes, h[s]);
  }
  void recall(int64_t item, F32* h) const {
#pragma GCC unroll 16
    for (int64_t s = 0; s < kDState; ++s) h[s] = load(states[item % kHistory] + s * kLanes);
  }
};

// What makes y of a vector of channels out of its states.
template <int64_t kDState, Readout kReadout>
struct Reader {
  static constexpr bool kQuantized =
      kReadout == Readout::kInt8 || kReadout == Readout::kRotatedInt8;
  static constexpr bool kKeeps = kDState > 0 && kReadout == Readout::kRotatedInt8;

  Reader(const SelectiveScanParams& p, int64_t c, int64_t n)
      : rounding(p, c, n), D(load_or(p.D, c, n, 0.0f)), dstate(kDState > 0 ? kDState : p.dstate) {}

  F32 y(const F32* h, const TokenBlock& block, int64_t t, F32 x) const {
    if constexpr (kQuantized) {
      constexpr bool kRotate = kReadout == Readout::kRotatedInt8;
      const int16_t* C = block.C_words + t * words_of(dstate);
      return fma(D, x, read_out_int8<kDState, kRotate>(h, C, dstate, rounding));
    } else {
      return fma(D, x, read_out<kDState>(h, block.C + t * dstate, dstate));
    }
  }

  Rounding rounding;
  F32 D;
  int64_t dstate;
};

// The recurrence over the tokens of one vector of channels: state_in (null: zeros) to state_out, both
// (dstate, dim) of one sequence; b->y gets the read-out and the skip.
template <int64_t kDState, Readout kReadout>
void scan_tokens(const SelectiveScanParams& p, const TokenBlock& block, const float* state_in,
                 float* state_out, ChannelBlock* b) {
  using Read = Reader<kDState, kReadout>;
  constexpr int64_t kMaxStates = kDState > 0 ? kDState : kMaxDState;
  const int64_t dstate = kDState > 0 ? kDState : p.dstate;
  const int64_t c = b->c, n = smaller(kLanes, b->c_end - c);
  // A copy, since rows of p.A lie dim apart and may share cache sets.
  alignas(64) float A[kMaxStates * kLanes];
  F32 h[kMaxStates];
#pragma GCC unroll 16
  for (int64_t s = 0; s < dstate; ++s) {
    store(A + s * kLanes, load_up_to(p.A + s * p.dim + c, n));
    h[s] = state_in == nullptr ? set1(0.0f) : load_up_to(state_in + s * p.dim + c, n);
  }
  const Read reader(p, c, n);
  History<Read::kKeeps ? kDState : 0> history;
  for (int64_t t = 0; t < block.tokens; ++t) {
    const int64_t token = block.token[t];
    for (const Column& column : b->ahead) prefetch(column.first + token * column.stride);
    const Step step(block.B + t * dstate, b->dt[t], b->x[t]);
#pragma GCC unroll 16
    for (int64_t s = 0; s < dstate; ++s) h[s] = step.next(h[s], load(A + s * kLanes), s);
    if constexpr (Read::kKeeps) {
      history.keep(t, h);
      if ((t + 1) % kHistory != 0 && t + 1 < block.tokens) continue;
      for (int64_t i = t / kHistory * kHistory; i <= t; ++i) {
        F32 kept[kDState];
        history.recall(i, kept);
        b->y[i] = reader.y(kept, block, i, b->x[i]);
      }
      history.recall(t, h);
    } else if constexpr (kReadout != Readout::kNone) {
      b->y[t] = reader.y(h, block, t, b->x[t]);
    }
  }
#pragma GCC unroll 16
  for (int64_t s = 0; s < dstate; ++s) store_up_to(state_out + s * p.dim + c, h[s], n);
}

// NOTE(one token): each state and each element of A is used once and comes from memory. Their rows are short runs
// that lie dim apart, which no hardware prefetcher follows: they are fetched this many vectors ahead.
constexpr int64_t kVectorsAhead = 4;

// Any channel is allowed, past the last too.
inline void fetch_states(const SelectiveScanParams& p, const float* state, int64_t s, int64_t c) {
  prefetch(p.A + s * p.dim + c);
  prefetch(state + s * p.dim + c);
}

// The same for one token of several whole vectors of channels.
template <int64_t kDState, Readout kReadout>
void scan_vectors(const SelectiveScanParams& p, const TokenBlock& block, const float* state_in,
                  float* state_out, ChannelBlock* b) {
  const int64_t dstate = kDState > 0 ? kDState : p.dstate;
  const float* const source = state_in == nullptr ? state_out : state_in;
  for (int64_t i = 0; i < b->vectors; ++i) {
    const int64_t c = b->c + i * kLanes;
    const Step step(block.B, b->dt[i], b->x[i]);
    F32 h[kDState > 0 ? kDState : kMaxDState];
#pragma GCC unroll 16
    for (int64_t s = 0; s < dstate; ++s) {
      fetch_states(p, source, s, c + kVectorsAhead * kLanes);
      const F32 before = state_in == nullptr ? set1(0.0f) : load(state_in + s * p.dim + c);
      h[s] = step.next(before, load(p.A + s * p.dim + c), s);
    }
#pragma GCC unroll 16
    for (int64_t s = 0; s < dstate; ++s) store(state_out + s * p.dim + c, h[s]);
    b->y[i] = Reader<kDState, kReadout>(p, c, Whole{}).y(h, block, 0, b->x[i]);
  }
}

template <typename AddendT>
void add(const SelectiveScanParams& p, const TokenBlock& block, ChannelBlock* b) {
  const AddendT* addend =
      static_cast<const AddendT*>(p.addend) + block.batch * p.addend_stride_batch;
  for_vectors(*b, [&](int64_t c, auto n, int64_t item) {
    for (int64_t t = 0; t < block.tokens; ++t, ++item) {
      const int64_t at = block.token[t] * p.addend_stride_token + c;
      b->y[item] = b->y[item] + load_up_to(addend + at, n);
    }
  });
}

// y, times z * sigmoid(gate_scale * z) where there is a z, to storage.
template <typename YT, typename ZT>
void finish(const SelectiveScanParams& p, const TokenBlock& block, const ChannelBlock& b) {
  for_vectors(b, [&](int64_t c, auto n, int64_t item) {
    YT* y = static_cast<YT*>(p.y) + block.batch * p.seqlen * p.dim + c;
    const ZT* z = static_cast<const ZT*>(p.z) + block.batch * p.z_stride_batch + c;
    const F32 z_scale = load_or(p.z_scale, c, n, 1.0f);
    const F32 exponent = z_scale * load_or(p.gate_scale, c, n, 1.0f) * set1(-kLog2E);
    for (int64_t t = 0; t < block.tokens; ++t, ++item) {
      const int64_t token = block.token[t];
      const F32 z_t = load_up_to(z + token * p.z_stride_token, n);
      const F32 gate = (z_t * z_scale) / one_plus_exp2(z_t, exponent);
      store_up_to(y + token * p.dim, b.y[item] * gate, n);
    }
  });
}
template <typename YT>
void store_y(const SelectiveScanParams& p, const TokenBlock& block, const ChannelBlock& b) {
  YT* y = static_cast<YT*>(p.y) + block.batch * p.seqlen * p.dim;
  for_vectors(b, [&](int64_t c, auto n, int64_t item) {
    for (int64_t t = 0; t < block.tokens; ++t, ++item) {
      store_up_to(y + block.token[t] * p.dim + c, b.y[item], n);
    }
  });
}

// The loops of a block for the types at hand, chosen once per call.
struct Loops {
  using Convert = void (*)(const SelectiveScanParams&, TokenBlock*);
  using Scan = void (*)(const SelectiveScanParams&, const TokenBlock&, const float*, float*,
                        ChannelBlock*);
  Convert convert_B = nullptr, convert_C = nullptr;
  void (*prepare)(const SelectiveScanParams&, const TokenBlock&, ChannelBlock*) = nullptr;
  Scan scan_tokens = nullptr, scan_vectors = nullptr, scan_without_readout = nullptr;
  void (*add)(const SelectiveScanParams&, const TokenBlock&, ChannelBlock*) = nullptr;
  void (*finish)(const SelectiveScanParams&, const TokenBlock&, const ChannelBlock&) = nullptr;
};

template <int64_t kDState, Readout kReadout>
void set_scan(Loops* loops) {
  loops->scan_tokens = &scan_tokens<kDState, kReadout>;
  loops->scan_vectors = &scan_vectors<kDState, kReadout>;
  loops->scan_without_readout = &scan_tokens<kDState, Readout::kNone>;
}
template <int64_t kDState>
void choose_scan(const SelectiveScanParams& p, Loops* loops) {
  if (p.readout_scale == nullptr) {
    set_scan<kDState, Readout::kFloat>(loops);
  } else if (p.rotate_state) {
    set_scan<kDState, Readout::kRotatedInt8>(loops);
  } else {
    set_scan<kDState, Readout::kInt8>(loops);
  }
}

template <typename YT>
Status choose_finish(const SelectiveScanParams& p, Loops* loops) {
  if (p.z == nullptr) {
    loops->finish = &store_y<YT>;
    return Status::ok();
  }
  const auto choose = [&](auto tag) {
    using ZT = typename decltype(tag)::type;
    loops->finish = &finish<YT, ZT>;
    return Status::ok();
  };
  return MBQ_DISPATCH_FLOAT_OR_INT8(p.z_dtype, choose);
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
    return choose(&loops->convert_B, &convert_B<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  status = MBQ_DISPATCH_FLOAT_OR_INT8(p.C_dtype, [&](auto tag) {
    return choose(&loops->convert_C, &convert_C<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  if (p.readout_scale != nullptr) loops->convert_C = &widen_C;
  status = MBQ_DISPATCH_FLOAT(p.dt_dtype, [&](auto tag) {
    return choose(&loops->prepare, &prepare<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  status = MBQ_DISPATCH_FLOAT(p.addend_dtype, [&](auto tag) {
    return choose(&loops->add, &add<typename decltype(tag)::type>);
  });
  if (!status.is_ok()) return status;
  return MBQ_DISPATCH_FLOAT(
      p.y_dtype, [&](auto tag) { return choose_finish<typename decltype(tag)::type>(p, loops); });
}

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
