// hadamard_transform, hadamard_quantize. A row is transformed in a float32 scratch row by passes:
//   lanes     load and convert x; stages of stride 1 .. kLanes / 2 inside each vector, then up to
//             kMaxRadixLog more among the 2^r neighbouring vectors held in registers
//   vertical  stages of larger stride, up to kMaxRadixLog at a time
//   base      H_m across the m blocks, vectors along a block. Four blocks at a time are expanded
//             into their signed sums, and each output block adds one sum of every group: about
//             m / 4 + 2.5 additions an element instead of m - 1
//   finish    max|y| where the scale is dynamic; 1 / sqrt(dim) and scale as one factor; the store
// Nothing but x is read from memory and nothing but the result is written.
//
// Bound: float32 to int8 moves 5 bytes an element. Instructions per vector, on two ports: lanes 4
// shuffles and 4 fma, one addition for each further stage, m / 4 + 2.5 for the base, 5 to quantize.
// With 16 lanes that is 20 for dim 2048 and 24 for 5120: 10 and 12 cycles, measured 4.3 and 4.9 ns,
// for 80 bytes. Rows in cache are therefore bound by arithmetic, rows in memory by bytes.
//
// The scratch row is on the stack (a compile-time bound of 128 KiB, of which dim floats are
// touched): no workspace to size and pass for something that never leaves L1 or L2.
#include "mambaquant/hadamard.h"

#include "cpu/kernels.h"
#include "cpu/simd/quant.h"
#include "mambaquant/hadamard_base.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kElementsPerTask = 8192;
// 2^kMaxRadixLog vectors are in flight: half of the 32 or 16 registers.
constexpr int32_t kMaxRadixLog = kLanes == 16 ? 4 : 3;
constexpr int32_t kMaxPasses = 8;
constexpr int64_t kMaxGroups = kMaxHadamardBaseOrder / 4;
constexpr int64_t kVectorBytes = 64;

constexpr int32_t kNumBases = sizeof(kHadamardBases) / sizeof(kHadamardBases[0]);

// How a row is worked off; the same for every row of a call.
struct Plan {
  int64_t dim, block;          // block = 2^k
  int64_t base_order, groups;  // m, m / 4
  const uint64_t* signs;       // of the base, by output block
  bool inverse;
  int32_t passes;  // lanes pass and vertical passes
  int32_t radix_log[kMaxPasses];
  float norm;  // 1 / sqrt(dim)
};

Plan make_plan(const HadamardParams& p) {
  Plan plan{};
  plan.dim = p.dim;
  plan.base_order = p.base_order;
  for (const HadamardBase& base : kHadamardBases) {
    if (base.order == p.base_order) plan.signs = p.inverse ? base.inverse : base.forward;
  }
  plan.inverse = p.inverse;
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
void lanes_pass(const T* x, float* row, int64_t dim) {
  constexpr int32_t kRadix = 1 << kLog;
  for (int64_t base = 0; base < dim; base += kRadix * kLanes) {
    F32 v[kRadix];
#pragma GCC unroll 16
    for (int32_t i = 0; i < kRadix; ++i) v[i] = hadamard_lanes(load(x + base + i * kLanes));
    butterflies<kLog>(v);
#pragma GCC unroll 16
    for (int32_t i = 0; i < kRadix; ++i) store(row + base + i * kLanes, v[i]);
  }
}

// Blocks shorter than a vector: H of a zero-padded block begins with H of the block.
template <typename T>
void short_lanes_pass(const T* x, float* row, int64_t dim, int64_t block) {
  for (int64_t base = 0; base < dim; base += block) {
    store(row + base, hadamard_lanes(load(x + base, block)), block);
  }
}

// kLog stages, the first of them with this stride.
template <int32_t kLog>
void vertical_pass(float* row, int64_t dim, int64_t stride) {
  constexpr int32_t kRadix = 1 << kLog;
  for (int64_t base = 0; base < dim; base += stride * kRadix) {
    for (int64_t j = base; j < base + stride; j += kLanes) {
      F32 v[kRadix];
#pragma GCC unroll 16
      for (int32_t i = 0; i < kRadix; ++i) v[i] = load(row + j + i * stride);
      butterflies<kLog>(v);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kRadix; ++i) store(row + j + i * stride, v[i]);
    }
  }
}

// The base at one vector position of every block, its signs known to the compiler. Bit 0, 1, 2 of s
// negates a, b, c in sums[g][s] = +-a +-b +-c + d; a sum with -d is subtracted, as its complement.
// The outer loops unroll completely.
template <int32_t kIndex>
inline void base_vector(float* row, int64_t block) {
  constexpr const HadamardBase& kBase = kHadamardBases[kIndex];
  constexpr int32_t kOrder = static_cast<int32_t>(kBase.order), kGroups = kOrder / 4;
  F32 sums[kGroups][8];
#pragma GCC unroll 16
  for (int32_t g = 0; g < kGroups; ++g) {
    const float* first = row + 4 * g * block;
    const F32 a = load(first), b = load(first + block);
    const F32 c = load(first + 2 * block), d = load(first + 3 * block);
    const F32 low[4] = {a + b, b - a, a - b, set1(0.0f) - (a + b)};
    const F32 high[2] = {c + d, d - c};
#pragma GCC unroll 8
    for (int32_t s = 0; s < 8; ++s) sums[g][s] = low[s % 4] + high[s / 4];
  }
#pragma GCC unroll 64
  for (int32_t r = 0; r < kOrder; ++r) {
    const uint64_t signs = kBase.forward[r];
    F32 total = (signs & 8u) == 0 ? sums[0][signs & 7u] : set1(0.0f) - sums[0][~signs & 7u];
#pragma GCC unroll 16
    for (int32_t g = 1; g < kGroups; ++g) {
      const uint64_t code = (signs >> (4 * g)) & 15u;
      total = code < 8 ? total + sums[g][code] : total - sums[g][15 - code];
    }
    store(row + r * block, total);
  }
}

// As base_vector for any base, or the first n lanes of it, by look-up: sums[g] holds all 16 signed
// sums.
template <typename Load, typename Store>
inline void any_base_vector(const Plan& plan, float* row, const Load& load_block,
                            const Store& store_block) {
  alignas(kVectorBytes) float sums[kMaxGroups][16][kLanes];
  for (int64_t g = 0; g < plan.groups; ++g) {
    const float* first = row + 4 * g * plan.block;
    const F32 a = load_block(first), b = load_block(first + plan.block);
    const F32 c = load_block(first + 2 * plan.block), d = load_block(first + 3 * plan.block);
    const F32 low[4] = {a + b, b - a, a - b, set1(0.0f) - (a + b)};
    const F32 high[4] = {c + d, d - c, c - d, set1(0.0f) - (c + d)};
#pragma GCC unroll 16
    for (int32_t s = 0; s < 16; ++s) store(sums[g][s], low[s % 4] + high[s / 4]);
  }
  for (int64_t r = 0; r < plan.base_order; ++r) {
    uint64_t signs = plan.signs[r];
    F32 total = load(sums[0][signs & 15u]);
    for (int64_t g = 1; g < plan.groups; ++g) {
      signs >>= 4;
      total = total + load(sums[g][signs & 15u]);
    }
    store_block(row + r * plan.block, total);
  }
}

// kIndex: the first base that is still a candidate.
template <int32_t kIndex = 1>
void forward_base_pass(const Plan& plan, float* row) {
  if constexpr (kIndex < kNumBases) {
    if (plan.base_order != kHadamardBases[kIndex].order) {
      return forward_base_pass<kIndex + 1>(plan, row);
    }
    for (int64_t j = 0; j < plan.block; j += kLanes) base_vector<kIndex>(row + j, plan.block);
  }
}

void base_pass(const Plan& plan, float* row) {
  const int64_t block = plan.block;
  if (block < kLanes) {
    return any_base_vector(
        plan, row, [&](const float* p) { return load(p, block); },
        [&](float* p, F32 v) { store(p, v, block); });
  }
  if (!plan.inverse) return forward_base_pass(plan, row);
  for (int64_t j = 0; j < block; j += kLanes) {
    any_base_vector(
        plan, row + j, [](const float* p) { return load(p); },
        [](float* p, F32 v) { store(p, v); });
  }
}

// x H sqrt(dim) into row.
template <typename T>
void transform_row(const Plan& plan, const T* x, float* row) {
  if (plan.block < kLanes) {
    short_lanes_pass(x, row, plan.dim, plan.block);
  } else {
    with_radix(plan.radix_log[0], [&](auto log) { lanes_pass<log.value>(x, row, plan.dim); });
    int64_t stride = kLanes << plan.radix_log[0];
    for (int32_t i = 1; i < plan.passes; ++i) {
      with_radix(plan.radix_log[i],
                 [&](auto log) { vertical_pass<log.value>(row, plan.dim, stride); });
      stride <<= plan.radix_log[i];
    }
  }
  if (plan.base_order != 1) base_pass(plan, row);
}

template <typename T>
void finish_row(const float* row, float norm, T* y, int64_t dim) {
  const F32 factor = set1(norm);
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store(y + c, load(row + c) * factor);
  if (c < dim) store(y + c, load(row + c, dim - c) * factor, dim - c);
}

float row_amax(const float* row, int64_t dim) {
  F32 first = set1(0.0f), second = set1(0.0f);
  int64_t c = 0;
  for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
    first = max(abs(load(row + c)), first);
    second = max(abs(load(row + c + kLanes)), second);
  }
  for (; c < dim; c += kLanes) {
    first = max(abs(load(row + c, dim - c < kLanes ? dim - c : kLanes)), first);
  }
  return reduce_max(max(first, second));
}

void finish_row_int8(const float* row, float multiplier, int8_t* q, int64_t dim) {
  const F32 factor = set1(multiplier);
  int64_t c = 0;
  for (; c + 4 * kLanes <= dim; c += 4 * kLanes) {
    store4_symmetric(q + c, load(row + c), load(row + c + kLanes), load(row + c + 2 * kLanes),
                     load(row + c + 3 * kLanes), factor);
  }
  for (; c < dim; c += kLanes) {
    const int64_t n = dim - c < kLanes ? dim - c : kLanes;
    store_symmetric(q + c, load(row + c, n), factor, n);
  }
}

// Transforms each row and calls finish(plan, token, row).
template <typename T, typename Finish>
Status for_each_row(const HadamardParams& p, const Threads& threads, const Finish& finish) {
  const Plan plan = make_plan(p);
  const T* x = static_cast<const T*>(p.x);
  threads.parallel_for(p.tokens, kElementsPerTask / p.dim + 1, [&](int64_t begin, int64_t end) {
    alignas(kVectorBytes) float row[kMaxHadamardDim];
    for (int64_t t = begin; t < end; ++t) {
      transform_row(plan, x + t * p.x_stride_token, row);
      finish(plan, t, row);
    }
  });
  return Status::ok();
}

}  // namespace

Status hadamard_transform(const HadamardParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return for_each_row<T>(p, threads, [&](const Plan& plan, int64_t t, const float* row) {
      finish_row(row, plan.norm, static_cast<T*>(p.y) + t * p.dim, p.dim);
    });
  });
}

Status hadamard_quantize(const HadamardParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return for_each_row<T>(p, threads, [&](const Plan& plan, int64_t t, const float* row) {
      if (p.scale == nullptr) p.scale_out[t] = scale_from_amax(row_amax(row, p.dim) * plan.norm);
      const float scale = p.scale == nullptr ? p.scale_out[t] : p.scale[0];
      finish_row_int8(row, plan.norm * (1.0f / scale), p.q + t * p.dim, p.dim);
    });
  });
}

}  // namespace mambaquant::cpu::MBQ_ISA
