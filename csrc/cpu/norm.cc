// norm_quantize. A row is read from memory once; the later passes over it (variance, max|y|,
// rounding) find it in L1 or L2. With a residual they read residual_out, so that what is
// normalised is what was stored. Vectors run along a row; four accumulators over blocks of
// kSumBlock columns, always the same ones for the same column, make the order of a sum a function
// of dim alone and keep its error small in long rows.
//
// Bound: bytes. float32 moves 5 bytes an element (13 with a residual) and computes, per vector, 1
// instruction in the first pass, 7 in the rounding pass and 4 more where the scale is dynamic.
// The rounding pass prefetches the next row: 15 to 20 % less time at 1024 rows of 1536 and 2048.
#include "mambaquant/norm.h"

#include "cpu/kernels.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kElementsPerTask = 8192;
constexpr int64_t kAccumulators = 4;
constexpr int64_t kSumBlock = 4096;

// Calls f(column, n, accumulator) over columns [c, end); n is All for a whole vector, First for the
// tail.
struct All {};
struct First {
  int64_t n;
};
template <typename F>
inline void for_each_vector(int64_t c, int64_t end, const F& f) {
  for (; c + kAccumulators * kLanes <= end; c += kAccumulators * kLanes) {
    f(c, All{}, IntTag<0>{});
    f(c + kLanes, All{}, IntTag<1>{});
    f(c + 2 * kLanes, All{}, IntTag<2>{});
    f(c + 3 * kLanes, All{}, IntTag<3>{});
  }
  for (; c + kLanes <= end; c += kLanes) f(c, All{}, IntTag<0>{});
  if (c < end) f(c, First{end - c}, IntTag<1>{});
}

template <typename T>
inline F32 load_some(const T* p, All) {
  return load(p);
}
template <typename T>
inline F32 load_some(const T* p, First first) {
  return load(p, first.n);
}
template <typename T>
inline void store_some(T* p, F32 x, All) {
  store(p, x);
}
template <typename T>
inline void store_some(T* p, F32 x, First first) {
  store(p, x, first.n);
}
inline F32 zero_rest(F32 x, All) { return x; }
inline F32 zero_rest(F32 x, First first) { return keep_first(x, first.n); }

struct Accumulators {
  F32 lanes[kAccumulators] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};

  float sum() const { return reduce_add((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }
  float maximum() const {
    return reduce_max(max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3])));
  }
};

// The sum over a row; add(column, n, acc) returns acc plus the terms of one vector.
template <typename F>
inline float sum_row(int64_t dim, const F& add) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < dim; begin += kSumBlock) {
    Accumulators part;
    const int64_t end = dim - begin < kSumBlock ? dim : begin + kSumBlock;
    for_each_vector(begin, end, [&](int64_t c, auto n, auto slot) {
      part.lanes[slot.value] = add(c, n, part.lanes[slot.value]);
    });
    total += part.sum();
  }
  return total;
}

// A row's normalisation, applied to one vector of columns.
struct Affine {
  F32 mean, rstd;
  const float* weight;
  const float* bias;

  template <bool kSubtractMean, typename N>
  F32 apply(F32 s, int64_t c, N n) const {
    F32 y = (kSubtractMean ? s - mean : s) * rstd;
    if (weight != nullptr) y = y * load_some(weight + c, n);
    if (kSubtractMean && bias != nullptr) y = y + load_some(bias + c, n);
    return y;
  }
};

// The rounding pass is bound by instructions, so it prefetches the next row (harmless past the last).

// The policies of the first pass: what a vector of s is, and what of it is accumulated on the way
// (s for LayerNorm's mean, s^2 for RMSNorm).
template <typename T>
struct PlainRow {
  const T* x;
  int64_t x_stride;

  const T* stored() const { return x; }
  void prefetch_next(int64_t c) const { prefetch(x + x_stride + c); }
  template <typename N>
  F32 first_read(int64_t c, N n) const {
    return load_some(x + c, n);
  }
};
template <typename T, typename R>
struct ResidualRow {
  const T* x;
  int64_t x_stride;
  const R* residual;
  int64_t residual_stride;
  R* out;

  const R* stored() const { return out; }
  void prefetch_next(int64_t c) const {
    prefetch(x + x_stride + c);
    prefetch(residual + residual_stride + c);
  }
  template <typename N>
  F32 first_read(int64_t c, N n) const {
    const F32 s = load_some(x + c, n) + load_some(residual + c, n);
    store_some(out + c, s, n);
    return load_some(out + c, n);  // rounded to R
  }
};

inline F32 rstd_of(float sum_of_squares, const NormQuantizeParams& p) {
  const F32 mean_square = set1(sum_of_squares / static_cast<float>(p.dim));
  return set1(1.0f) / sqrt(mean_square + set1(p.eps));
}

// First pass, and for LayerNorm the second: mean and rstd.
template <bool kSubtractMean, typename Row>
Affine measure_row(const NormQuantizeParams& p, const Row& row) {
  const float first = sum_row(p.dim, [&](int64_t c, auto n, F32 acc) {
    const F32 s = row.first_read(c, n);
    return kSubtractMean ? acc + s : fma(s, s, acc);
  });
  Affine affine{set1(0.0f), set1(0.0f), p.weight, p.bias};
  if constexpr (!kSubtractMean) {
    affine.rstd = rstd_of(first, p);
  } else {
    affine.mean = set1(first / static_cast<float>(p.dim));
    const auto* stored = row.stored();
    const float second = sum_row(p.dim, [&](int64_t c, auto n, F32 acc) {
      const F32 d = zero_rest(load_some(stored + c, n) - affine.mean, n);
      return fma(d, d, acc);
    });
    affine.rstd = rstd_of(second, p);
  }
  return affine;
}

template <bool kSubtractMean, typename Row>
void process_row(const NormQuantizeParams& p, const Row& row, int64_t token) {
  const Affine affine = measure_row<kSubtractMean>(p, row);
  const auto* stored = row.stored();
  if (p.scale == nullptr) {
    Accumulators amax;
    for_each_vector(0, p.dim, [&](int64_t c, auto n, auto slot) {
      const F32 y = affine.template apply<kSubtractMean>(load_some(stored + c, n), c, n);
      amax.lanes[slot.value] = max(abs(zero_rest(y, n)), amax.lanes[slot.value]);
    });
    p.scale_out[token] = scale_from_amax(amax.maximum());
  }
  const F32 inv_scale = set1(1.0f / (p.scale == nullptr ? p.scale_out[token] : p.scale[0]));
  int8_t* q = p.q + token * p.dim;
  const auto y = [&](int64_t c, auto n) {
    return affine.template apply<kSubtractMean>(load_some(stored + c, n), c, n);
  };
  int64_t c = 0;
  for (; c + 4 * kLanes <= p.dim; c += 4 * kLanes) {
    for (int64_t i = 0; i < 4; ++i) row.prefetch_next(c + i * kLanes);
    store4_symmetric(q + c, y(c, All{}), y(c + kLanes, All{}), y(c + 2 * kLanes, All{}),
                     y(c + 3 * kLanes, All{}), inv_scale);
  }
  for (; c < p.dim; c += kLanes) {
    const int64_t n = p.dim - c < kLanes ? p.dim - c : kLanes;
    store_symmetric(q + c, y(c, First{n}), inv_scale, n);
  }
}

// `make_row` is called as Row(token).
template <typename MakeRow>
Status process_rows(const NormQuantizeParams& p, const Threads& threads, const MakeRow& make_row) {
  const int64_t rows_per_task = kElementsPerTask / (p.dim + 1) + 1;
  threads.parallel_for(p.tokens, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (p.subtract_mean) {
        process_row<true>(p, make_row(t), t);
      } else {
        process_row<false>(p, make_row(t), t);
      }
    }
  });
  return Status::ok();
}

template <typename T>
Status norm_typed(const NormQuantizeParams& p, const Threads& threads) {
  const T* x = static_cast<const T*>(p.x);
  if (p.residual == nullptr) {
    return process_rows(p, threads, [&](int64_t t) {
      return PlainRow<T>{x + t * p.x_stride_token, p.x_stride_token};
    });
  }
  return MBQ_DISPATCH_FLOAT(p.residual_dtype, [&](auto tag) {
    using R = typename decltype(tag)::type;
    return process_rows(p, threads, [&](int64_t t) {
      return ResidualRow<T, R>{x + t * p.x_stride_token, p.x_stride_token,
                               static_cast<const R*>(p.residual) + t * p.residual_stride_token,
                               p.residual_stride_token,
                               static_cast<R*>(p.residual_out) + t * p.dim};
    });
  });
}

}  // namespace

Status norm_quantize(const NormQuantizeParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(
      p.x_dtype, [&](auto tag) { return norm_typed<typename decltype(tag)::type>(p, threads); });
}

}  // namespace mambaquant::cpu::MBQ_ISA
