// One block of selective_scan: a vector of channels over a few tokens.
//
// One channel per lane: the dstate states of a vector of channels are dstate vectors, so that
// neither the read-out nor the rotation of the states crosses lanes. A block goes through three
// loops: prepare (softplus, dequantize x), scan (the recurrence, 16 states in registers where dstate
// is 16) and finish (skip, gate, store). Only prepare and finish know the storage types.
//
// Bound: arithmetic. Per channel vector and state 10 micro-operations of exp2 and 3 of recurrence
// and read-out, 208 per token at two a cycle; the quantized read-out adds 5 per state, the
// rotation 4. A token moves only 7 to 13 bytes per channel. Measured (AVX-512, 2.95 GHz, dstate 16,
// operands in L1): scan 106 cycles per token and channel vector, 149 with the quantized and 200
// with the rotated read-out; prepare 26, finish 20. In the 130m layer (512 tokens) 166 in all, 90 %
// of it in these loops.
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

// Steps [begin, begin + tokens) of the walk over one sequence.
struct TokenBlock {
  int64_t batch = 0, begin = 0, tokens = 0;
  alignas(64) float B[kBlockStates];  // (tokens, dstate), dequantized
  alignas(64) float C[kBlockStates];  // as B; with a quantized read-out, C's integers
  int64_t token[kBlockTokens];        // where in storage each step is
};

// A column of one operand that is wanted soon: one line per token.
struct Column {
  const char* first = nullptr;  // of token 0
  int64_t stride = 0;           // bytes
};

// One vector of channels within a token block.
struct ChannelBlock {
  int64_t c = 0, n = 0;  // first channel; how many, up to kLanes
  Column ahead[4];       // x, dt, y, and z of the channel vector that comes next
  F32 x[kBlockTokens], dt[kBlockTokens], y[kBlockTokens];
};

// A (tokens, dstate) block of B or C, from the rows `block.token` of `source`, to float32; scale:
// (dstate,), or (1,) for all states, or null.
template <typename T>
void convert_states(const void* source, int64_t stride, const TokenBlock& block, const float* scale,
                    bool is_scale_shared, int64_t dstate, float* out) {
  for (int64_t t = 0; t < block.tokens; ++t, out += dstate) {
    const T* row = static_cast<const T*>(source) + block.token[t] * stride;
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
  const int64_t x_stride = p.x_stride_token, dt_stride = p.dt_stride_token;
  const int8_t* x = p.x + block.batch * p.x_stride_batch + c;
  const DtT* dt = static_cast<const DtT*>(p.dt) + block.batch * p.dt_stride_batch + c;
  const F32 scale = load_up_to(p.x_scale + c, n);
  const F32 zero = p.x_zero_point == nullptr ? set1(0.0f) : to_f32(load_i32(p.x_zero_point + c, n));
  const F32 bias = load_or(p.dt_bias, c, n, 0.0f);
  for (int64_t t = 0; t < block.tokens; ++t) {
    const int64_t token = block.token[t];
    b->x[t] = (load_up_to(x + token * x_stride, n) - zero) * scale;
    b->dt[t] = softplus(load_up_to(dt + token * dt_stride, n) + bias);
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
    const int64_t token = block.token[t];
    for (const Column& column : b->ahead) prefetch(column.first + token * column.stride);
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
  const int64_t c = b->c, n = b->n, stride = p.z_stride_token;
  const ZT* z = static_cast<const ZT*>(p.z) + block.batch * p.z_stride_batch + c;
  const F32 z_scale = load_or(p.z_scale, c, n, 1.0f);
  const F32 gate_scale = load_or(p.gate_scale, c, n, 1.0f);
  for (int64_t t = 0; t < block.tokens; ++t) {
    const F32 z_f = load_up_to(z + block.token[t] * stride, n) * z_scale;
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

template <typename AddendT>
void add(const SelectiveScanParams& p, const TokenBlock& block, ChannelBlock* b) {
  const AddendT* addend =
      static_cast<const AddendT*>(p.addend) + block.batch * p.addend_stride_batch + b->c;
  for (int64_t t = 0; t < block.tokens; ++t) {
    b->y[t] = b->y[t] + load_up_to(addend + block.token[t] * p.addend_stride_token, b->n);
  }
}

template <typename YT>
void store_y(const SelectiveScanParams& p, const TokenBlock& block, const ChannelBlock& b) {
  const int64_t n = b.n, stride = p.dim;
  YT* y = static_cast<YT*>(p.y) + block.batch * p.seqlen * stride + b.c;
  for (int64_t t = 0; t < block.tokens; ++t) {
    store_up_to(y + block.token[t] * stride, b.y[t], n);
  }
}

// The loops of a block for the types at hand, chosen once per call.
struct Loops {
  void (*convert_B)(const void*, int64_t, const TokenBlock&, const float*, bool, int64_t,
                    float*) = nullptr;
  void (*convert_C)(const void*, int64_t, const TokenBlock&, const float*, bool, int64_t,
                    float*) = nullptr;
  void (*prepare)(const SelectiveScanParams&, const TokenBlock&, ChannelBlock*) = nullptr;
  void (*scan)(const SelectiveScanParams&, const TokenBlock&, const float*, float*,
               ChannelBlock*) = nullptr;
  void (*scan_without_readout)(const SelectiveScanParams&, const TokenBlock&, const float*, float*,
                               ChannelBlock*) = nullptr;
  void (*add)(const SelectiveScanParams&, const TokenBlock&, ChannelBlock*) = nullptr;
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
  status = MBQ_DISPATCH_FLOAT(p.addend_dtype, [&](auto tag) {
    return choose(&loops->add, &add<typename decltype(tag)::type>);
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

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
