// hadamard_transform, hadamard_quantize. A row is transformed in float32 scratch in three kinds of
// pass:
//   1. lanes:     load and convert x; stages of stride 1 .. kLanes / 2 inside each vector, then up
//   to kMaxRadixLog
//                 more among the 2^r neighbouring vectors held in registers
//   2. vertical:  stages of larger stride, up to kMaxRadixLog in one pass over the scratch
//   3. base:      H_m across the m blocks, vectors along a block. Four blocks at a time are
//   expanded into their 16
//                 signed sums (24 additions), and each output block adds one of the 16 per group: m
//                 / 4 - 1 additions an element instead of m - 1
// The last pass hands its results to a sink (output, int8, or scratch with max|y|), which applies
// 1 / sqrt(dim): nothing but x is read from memory and nothing but the result is written.
//
// Bound: float32 to int8 moves 5 bytes an element. Arithmetic per 16 elements: 4 fma and 4 shuffles
// in the lanes (4 cycles, two ports), one addition for each further stage, m / 4 + 5 additions for
// the base.
//
// The scratch row is on the stack (a compile-time bound of 128 KiB, of which dim floats are
// touched): no workspace to size and pass for something that never leaves L1 or L2.
#include "mambaquant/hadamard.h"

#include "cpu/kernels.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kElementsPerTask = 8192;
// 2^kMaxRadixLog vectors are in flight: half of the 32 or 16 registers.
constexpr int32_t kMaxRadixLog = kLanes == 16 ? 4 : 3;
constexpr int32_t kMaxPasses = 8;
constexpr int64_t kMaxGroups = 15;  // of four blocks
constexpr int64_t kVectorBytes = 64;

// How a row is worked off; the same for every row of a call.
struct Plan {
  int64_t dim, block;          // block = 2^k
  int64_t base_order, groups;  // m, m / 4
  const uint64_t* base_signs;
  int32_t passes;  // lanes pass and vertical passes
  int32_t radix_log[kMaxPasses];
  float norm;  // 1 / sqrt(dim)
};

Plan make_plan(const HadamardParams& p) {
  Plan plan{};
  plan.dim = p.dim;
  plan.base_order = p.base_order;
  plan.base_signs = p.base_signs;
  plan.groups = p.base_order / 4;
  plan.block = p.dim / p.base_order;
  int32_t stages = 0;  // beyond the lanes
  for (int64_t width = kLanes; width < plan.block; width *= 2) ++stages;
  plan.passes = stages <= kMaxRadixLog ? 1 : (stages + kMaxRadixLog - 1) / kMaxRadixLog;
  for (int32_t i = 0; i < plan.passes; ++i) {
    plan.radix_log[i] = stages / (plan.passes - i);
    stages -= plan.radix_log[i];
  }
  plan.norm = reduce_max(set1(1.0f) / sqrt(set1(static_cast<float>(p.dim))));
  return plan;
}

// What becomes of a finished vector at column i; n: only its first n lanes.
struct ToScratch {
  float* row;
  void operator()(int64_t i, F32 v) { store(row + i, v); }
  void operator()(int64_t i, F32 v, int64_t n) { store(row + i, v, n); }
};
struct ToScratchWithAmax {
  float* row;
  F32 amax;
  void operator()(int64_t i, F32 v) {
    amax = max(abs(v), amax);
    store(row + i, v);
  }
  void operator()(int64_t i, F32 v, int64_t n) {
    amax = max(abs(keep_first(v, n)), amax);
    store(row + i, v, n);
  }
};
struct ToInt8 {
  int8_t* q;
  F32 multiplier;  // norm / scale
  void operator()(int64_t i, F32 v) { store(q + i, quantize_symmetric(v, multiplier)); }
  void operator()(int64_t i, F32 v, int64_t n) {
    store(q + i, quantize_symmetric(v, multiplier), n);
  }
};
template <typename T>
struct ToOutput {
  T* y;
  F32 norm;
  void operator()(int64_t i, F32 v) { store(y + i, v * norm); }
  void operator()(int64_t i, F32 v, int64_t n) { store(y + i, v * norm, n); }
};

// Sylvester's transform among 2^kLog vectors, small strides first.
template <int32_t kLog>
inline void butterflies(F32* v) {
  if constexpr (kLog > 0) {
    constexpr int32_t kHalf = 1 << (kLog - 1);
    butterflies<kLog - 1>(v);
    butterflies<kLog - 1>(v + kHalf);
#pragma GCC unroll 16
    for (int32_t i = 0; i < kHalf; ++i) {
      const F32 a = v[i], b = v[i + kHalf];
      v[i] = a + b;
      v[i + kHalf] = a - b;
    }
  }
}

// Calls f with IntTag<log>, log in [0, kMaxRadixLog].
template <typename F>
inline void with_radix(int32_t log, const F& f) {
  if constexpr (kMaxRadixLog >= 4) {
    if (log == 4) return f(IntTag<4>{});
  }
  if (log == 3) return f(IntTag<3>{});
  if (log == 2) return f(IntTag<2>{});
  if (log == 1) return f(IntTag<1>{});
  f(IntTag<0>{});
}

template <int32_t kLog, typename T>
void lanes_pass(const T* x, float* scratch, int64_t dim) {
  constexpr int32_t kRadix = 1 << kLog;
  for (int64_t base = 0; base < dim; base += kRadix * kLanes) {
    F32 v[kRadix];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kRadix; ++i) v[i] = hadamard_lanes(load(x + base + i * kLanes));
    butterflies<kLog>(v);
#pragma GCC unroll 16
    for (int32_t i = 0; i < kRadix; ++i) store(scratch + base + i * kLanes, v[i]);
  }
}

// Blocks shorter than a vector: H of a zero-padded block begins with H of the block.
template <typename T>
void short_lanes_pass(const T* x, float* scratch, int64_t dim, int64_t block) {
  for (int64_t base = 0; base < dim; base += block) {
    store(scratch + base, hadamard_lanes(load(x + base, block)), block);
  }
}

// kLog stages, the first of them with this stride.
template <int32_t kLog, typename Sink>
void vertical_pass(const float* scratch, int64_t dim, int64_t stride, Sink& sink) {
  constexpr int32_t kRadix = 1 << kLog;
  for (int64_t base = 0; base < dim; base += stride * kRadix) {
    for (int64_t j = base; j < base + stride; j += kLanes) {
      F32 v[kRadix];
#pragma GCC unroll 16
      for (int32_t i = 0; i < kRadix; ++i) v[i] = load(scratch + j + i * stride);
      butterflies<kLog>(v);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kRadix; ++i) sink(j + i * stride, v[i]);
    }
  }
}

// sums[s] = +-a +-b +-c +-d, where bit 0, 1, 2, 3 of s negates a, b, c, d.
inline void expand_group(F32 a, F32 b, F32 c, F32 d, float (*sums)[kLanes]) {
  const F32 zero = set1(0.0f);
  const F32 low[4] = {a + b, b - a, a - b, zero - (a + b)};
  const F32 high[4] = {c + d, d - c, c - d, zero - (c + d)};
#pragma GCC unroll 16
  for (int32_t s = 0; s < 16; ++s) store(sums[s], low[s % 4] + high[s / 4]);
}

// kGroups = m / 4 where it is known at compile time, 0 otherwise. `load_block(column)` and `sink`
// see one vector.
template <int64_t kGroups, typename LoadBlock, typename StoreBlock>
inline void base_vector(const Plan& plan, int64_t j, const LoadBlock& load_block,
                        const StoreBlock& store_block) {
  alignas(kVectorBytes) float sums[kGroups > 0 ? kGroups : kMaxGroups][16][kLanes];
  const int64_t groups = kGroups > 0 ? kGroups : plan.groups;
  const int64_t block = plan.block;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t i = 4 * g * block + j;
    expand_group(load_block(i), load_block(i + block), load_block(i + 2 * block),
                 load_block(i + 3 * block), sums[g]);
  }
  for (int64_t r = 0; r < 4 * groups; ++r) {
    uint64_t signs = plan.base_signs[r];
    F32 total = load(sums[0][signs & 15u]);
#pragma GCC unroll 8
    for (int64_t g = 1; g < groups; ++g) {
      signs >>= 4;
      total = total + load(sums[g][signs & 15u]);
    }
    store_block(r * block + j, total);
  }
}

template <int64_t kGroups, typename Sink>
void base_pass(const Plan& plan, const float* scratch, Sink& sink) {
  for (int64_t j = 0; j < plan.block; j += kLanes) {
    base_vector<kGroups>(
        plan, j, [&](int64_t i) { return load(scratch + i); },
        [&](int64_t i, F32 v) { sink(i, v); });
  }
}

// NOTE(base-order): every row of H_m is read whole before any block is written, so scratch may be
// the sink's row.
template <typename Sink>
void run_base(const Plan& plan, const float* scratch, Sink& sink) {
  const int64_t block = plan.block;
  if (block < kLanes) {
    return base_vector<0>(
        plan, 0, [&](int64_t i) { return load(scratch + i, block); },
        [&](int64_t i, F32 v) { sink(i, v, block); });
  }
  switch (plan.groups) {
    case 3:
      return base_pass<3>(plan, scratch, sink);
    case 5:
      return base_pass<5>(plan, scratch, sink);
    case 7:
      return base_pass<7>(plan, scratch, sink);
    default:
      return base_pass<0>(plan, scratch, sink);
  }
}

// x to the sink, by way of the scratch row.
template <typename T, typename Sink>
void transform_row(const Plan& plan, const T* x, float* scratch, Sink& sink) {
  if (plan.block < kLanes) {
    short_lanes_pass(x, scratch, plan.dim, plan.block);
    if (plan.base_order == 1) return sink(0, load(scratch, plan.dim), plan.dim);
    return run_base(plan, scratch, sink);
  }
  with_radix(plan.radix_log[0], [&](auto log) { lanes_pass<log.value>(x, scratch, plan.dim); });
  int64_t stride = kLanes << plan.radix_log[0];
  const int32_t last = plan.base_order == 1 ? plan.passes - 1 : plan.passes;
  for (int32_t i = 1; i < last; ++i) {
    ToScratch to_scratch{scratch};
    with_radix(plan.radix_log[i],
               [&](auto log) { vertical_pass<log.value>(scratch, plan.dim, stride, to_scratch); });
    stride <<= plan.radix_log[i];
  }
  if (plan.base_order != 1) return run_base(plan, scratch, sink);
  const int32_t radix_log = plan.passes > 1 ? plan.radix_log[last] : 0;
  with_radix(radix_log,
             [&](auto log) { vertical_pass<log.value>(scratch, plan.dim, stride, sink); });
}

// `body` is called as body(plan, token, scratch).
template <typename Body>
Status for_each_row(const HadamardParams& p, const Threads& threads, const Body& body) {
  const Plan plan = make_plan(p);
  threads.parallel_for(p.tokens, kElementsPerTask / p.dim + 1, [&](int64_t begin, int64_t end) {
    alignas(kVectorBytes) float scratch[kMaxHadamardDim];
    for (int64_t t = begin; t < end; ++t) body(plan, t, static_cast<float*>(scratch));
  });
  return Status::ok();
}

template <typename T>
Status transform_typed(const HadamardParams& p, const Threads& threads) {
  return for_each_row(p, threads, [&](const Plan& plan, int64_t t, float* scratch) {
    ToOutput<T> sink{static_cast<T*>(p.y) + t * p.dim, set1(plan.norm)};
    transform_row(plan, static_cast<const T*>(p.x) + t * p.x_stride_token, scratch, sink);
  });
}

template <typename T>
Status quantize_typed(const HadamardParams& p, const Threads& threads) {
  return for_each_row(p, threads, [&](const Plan& plan, int64_t t, float* scratch) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_stride_token;
    ToInt8 to_int8{p.q + t * p.dim, set1(0.0f)};
    if (p.scale != nullptr) {
      to_int8.multiplier = set1(plan.norm * (1.0f / p.scale[0]));
      return transform_row(plan, x, scratch, to_int8);
    }
    ToScratchWithAmax measured{scratch, set1(0.0f)};
    transform_row(plan, x, scratch, measured);
    p.scale_out[t] = scale_from_amax(reduce_max(measured.amax) * plan.norm);
    to_int8.multiplier = set1(plan.norm * (1.0f / p.scale_out[t]));
    int64_t c = 0;
    for (; c + kLanes <= plan.dim; c += kLanes) to_int8(c, load(scratch + c));
    if (c < plan.dim) to_int8(c, load(scratch + c, plan.dim - c), plan.dim - c);
  });
}

}  // namespace

Status hadamard_transform(const HadamardParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    return transform_typed<typename decltype(tag)::type>(p, threads);
  });
}

Status hadamard_quantize(const HadamardParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    return quantize_typed<typename decltype(tag)::type>(p, threads);
  });
}

}  // namespace mambaquant::cpu::MBQ_ISA
