// sample. A row's scores are written once (50,280 floats: 200 KB, in L2), with the maximum of every
// group of kGroup of them; what follows works on them in place, or on the packed candidates.
//
// top_k: the k-th largest of the groups' maxima is a lower bound of the k-th largest score, and few scores
// reach it: one pass packs those. top_p: a score too small to be kept whatever the others are is left out
// by one pass, too. find_threshold() then halves its range of float32, and with it the candidates.
//
// Bound: 200 KB read from L2 or L3 and written, and about 25 instructions a vector: 4 us greedy and 10 to
// 15 us with top_k = 50 on one core with AVX-512. The worst are flat distributions with top_p, where
// everything stays a candidate: 60 us, and 170 us with AVX2, which packs lane by lane.
#include "mambaquant/sampling.h"

#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kGroup = 64 * kLanes;  // scores; a group has a maximum for each lane
constexpr int64_t kDrawBlock = 256;      // scores whose sum is added at once
constexpr float kMinusInf = -__builtin_inff();
constexpr float kFullWeight = 1099511627776.0f;  // 2^kSampleWeightBits
constexpr float kHalfWeight = 1048576.0f;        // its square root
static_assert(kSampleWeightBits == 40);

// Scores, or what exp made of them, in the order of their ids.
struct Candidates {
  float* values;
  int32_t* ids;  // null: value i belongs to id i
  int64_t count;

  int64_t id(int64_t i) const { return ids == nullptr ? i : ids[i]; }
};

// Calls f(i, n) for vectors that begin at i and have n elements.
template <typename F>
inline void for_each_vector(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, count - i);
}

inline F32 load_or(const float* p, int64_t n, float rest) {
  if (n == kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < n ? p[lane] : rest;
  return load(lanes);
}

// Finite floats, and infinities at the ends, as integers in the same order; both zeros, which are equal, are 0.
inline int64_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits >= 0 ? bits : -static_cast<int64_t>(bits & 0x7fffffff);
}
inline float value_of(int64_t key) {
  const int64_t bits = key >= 0 ? key : (-key) | 0x80000000;
  const auto narrow = static_cast<uint32_t>(bits);
  float x;
  std::memcpy(&x, &narrow, sizeof(x));
  return x;
}

// e^x for x <= 0, at most 2 ulp for x >= -30, and below so little that its weight is 0. As exp() of
// cpu/simd/math.h, but without fma, so that every ISA gives the same bits.
inline F32 exp_same(F32 x) {
  x = max(x, set1(-30.0f));
  const F32 n = round_even(x * set1(1.44269504088896341f));
  F32 r = x - n * set1(0.693145751953125f);   // ln2, high part: 17 bits, n * high exact
  r = r - n * set1(1.42860682030941723e-6f);  // ln2, low part
  F32 p = set1(0.0013814601115882397f);
  p = p * r + set1(0.008368716575205326f);
  p = p * r + set1(0.04166838899254799f);
  p = p * r + set1(0.1666652113199234f);
  p = p * r + set1(0.4999999403953552f);
  p = p * r * r + r;
  return (p + set1(1.0f)) * exp2_int(n);
}

// e in [0, 1] -> rne(e * 2^40) as high * 2^20 + low, which both fit int32.
struct SplitWeight {
  I32 high, low;
};
inline SplitWeight split_weight(F32 e) {
  const F32 scaled = e * set1(kHalfWeight);
  const I32 high = to_i32(scaled);
  return {high, to_i32((scaled - to_f32(high)) * set1(kHalfWeight))};
}
inline int64_t sum_lanes(SplitWeight w) {
  int32_t high[kLanes], low[kLanes];
  store_i32(high, w.high);
  store_i32(low, w.low);
  int64_t sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += (static_cast<int64_t>(high[lane]) << 20) + low[lane];
  }
  return sum;
}
inline int64_t weight_of(float e) { return sum_lanes(split_weight(keep_first(set1(e), 1))); }

// The sum of the weights of `count` values.
int64_t sum_weights(const float* e, int64_t count) {
  constexpr int64_t kBlock = 1024 * kLanes;  // a lane's sum of `high` stays at 2^30
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    SplitWeight sum{set1_i32(0), set1_i32(0)};
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    for_each_vector(size, [&](int64_t i, int64_t n) {
      const SplitWeight w = split_weight(load(e + begin + i, n));
      sum = {sum.high + w.high, sum.low + w.low};
    });
    total += sum_lanes(sum);
  }
  return total;
}

// The values for which is_kept(F32) -> Mask, packed into `out`, which may be `values`; returns how many.
template <typename IsKept>
inline int64_t pack_values(const float* values, int64_t count, float* out, const IsKept& is_kept) {
  int64_t kept = 0;
  for_each_vector(count, [&](int64_t i, int64_t n) {
    const F32 x = load(values + i, n);
    kept += pack(out + kept, x, is_kept(x) & first_lanes(n));
  });
  return kept;
}

// The candidates of at least `low`, packed into `out`, which may be `in`.
Candidates keep_from(const Candidates& in, float low, Candidates out) {
  int32_t first[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) first[lane] = static_cast<int32_t>(lane);
  const I32 lanes = load_i32(first);
  out.count = 0;
  for_each_vector(in.count, [&](int64_t i, int64_t n) {
    const F32 x = load(in.values + i, n);
    const I32 ids =
        in.ids == nullptr ? lanes + set1_i32(static_cast<int32_t>(i)) : load_i32(in.ids + i, n);
    const Mask mask = at_most(set1(low), x) & first_lanes(n);
    pack(out.ids + out.count, ids, mask);
    out.count += pack(out.values + out.count, x, mask);
  });
  return out;
}

// The candidates without those that equal `value`, but for the first `needed` of them; in place.
Candidates keep_first_equal(Candidates candidates, float value, int64_t needed) {
  int64_t kept = 0;
  for (int64_t i = 0; i < candidates.count; ++i) {
    if (candidates.values[i] == value && --needed < 0) continue;
    candidates.values[kept] = candidates.values[i];
    candidates.ids[kept++] = candidates.ids[i];
  }
  candidates.count = kept;
  return candidates;
}

struct Range {
  float low, high;
};
Range range_of(const float* values, int64_t count) {
  F32 high = set1(kMinusInf), low = set1(kMinusInf);  // low: of the negated values
  for_each_vector(count, [&](int64_t i, int64_t n) {
    const F32 x = load_or(values + i, n, values[0]);
    high = max(high, x);
    low = max(low, set1(0.0f) - x);
  });
  return {-reduce_max(low), reduce_max(high)};
}

// The lowest value that is kept where values go in falling order until their measure reaches `target`, or
// the least of all if it does not; equal values together. `above` is the measure of those above it.
struct Threshold {
  float value;
  int64_t above;
};
// measure(values, count) >= 0 adds up over values; count >= 1; both arrays are overwritten.
template <typename Measure>
Threshold find_threshold(float* values, int64_t count, float* spare, int64_t target,
                         const Measure& measure) {
  int64_t measured = 0;
  for (;;) {
    const Range range = range_of(values, count);
    if (!(range.low < range.high)) return {range.high, measured};
    // low <= middle < high: each side keeps one of them at least.
    const F32 middle = set1(value_of((key_of(range.low) + key_of(range.high)) >> 1));
    const int64_t upper =
        pack_values(values, count, spare, [&](F32 x) { return above(x, middle); });
    const int64_t upper_measure = measure(spare, upper);
    if (measured + upper_measure >= target) {
      float* const packed = spare;
      spare = values;
      values = packed;
      count = upper;
    } else {
      measured += upper_measure;
      count = pack_values(values, count, values, [&](F32 x) { return at_most(x, middle); });
    }
  }
}

// One row of the batch, and its scratch.
struct Row {
  const SampleParams& p;
  int64_t index;
  float *scores, *kept, *spare;
  int32_t* kept_ids;

  Row(const SampleParams& params, int64_t i)
      : p(params),
        index(i),
        scores(params.scores + i * params.padded_vocab),
        kept(params.kept + i * params.padded_vocab),
        spare(params.spare + i * params.padded_vocab),
        kept_ids(params.kept_ids + i * params.padded_vocab) {}

  bool is_greedy() const { return p.temperature == 0.0f; }
  const float* penalised() const;
  bool score(const float* logits) const;
  int64_t first_largest(const float* logits, float best) const;
  Candidates keep_top_k() const;
  Candidates keep_top_p(const Candidates& in, int64_t total) const;
  int64_t draw(const Candidates& candidates, int64_t total) const;
  void write_weights(const Candidates& candidates) const;
  void write_weights_of(int64_t token) const;
  int64_t sample() const;

  // One maximum for each lane of each group, in `kept` until candidates are packed there.
  int64_t num_maxima() const { return (p.vocab + kGroup - 1) / kGroup * kLanes; }
};

// The logits, or a copy of them (in `scores`) where seen ids are penalised.
const float* Row::penalised() const {
  const float* logits = p.logits + index * p.logits_stride_row;
  if (p.penalty == 1.0f) return logits;
  std::memcpy(scores, logits, static_cast<size_t>(p.vocab) * sizeof(float));
  const int32_t* seen = p.seen + index * p.vocab;
  for (int64_t i = 0; i < p.num_seen[index]; ++i) {
    const float x = logits[seen[i]];
    scores[seen[i]] = x < 0.0f ? x * p.penalty : x / p.penalty;
  }
  return scores;
}

// Fills scores, which greedy has no use for, and maxima; false where a score is NaN or +inf.
bool Row::score(const float* logits) const {
  const F32 divisor = set1(is_greedy() ? 1.0f : p.temperature);
  const F32 lowest = set1(-3.402823466e38f);
  F32 check = set1(0.0f);
  for (int64_t begin = 0; begin < p.vocab; begin += kGroup) {
    const int64_t size = p.vocab - begin < kGroup ? p.vocab - begin : kGroup;
    F32 top = set1(kMinusInf);
    for_each_vector(size, [&](int64_t i, int64_t n) {
      const F32 z = load_or(logits + begin + i, n, kMinusInf) / divisor;
      if (!is_greedy()) store(scores + begin + i, z, n);
      top = max(top, z);
      check = check + max(lowest, z) * set1(0.0f);  // NaN for +inf and NaN; -inf is replaced
    });
    store(kept + begin / kGroup * kLanes, top);
  }
  return reduce_add(check) == 0.0f;
}

// The first of the logits that equals the largest of them.
int64_t Row::first_largest(const float* logits, float best) const {
  int64_t slot = 0;
  while (kept[slot] != best) ++slot;
  int64_t i = slot / kLanes * kGroup;
  while (logits[i] != best) ++i;
  return i;
}

// Every score that is at least the k-th largest.
Candidates Row::keep_top_k() const {
  const auto count_of = [](const float*, int64_t count) { return count; };
  const int64_t maxima = num_maxima();
  float bound = kMinusInf;
  if (p.top_k <= maxima) bound = find_threshold(kept, maxima, spare, p.top_k, count_of).value;
  const Candidates all{scores, nullptr, p.vocab};
  const Candidates some = keep_from(all, bound, {kept, kept_ids, 0});
  std::memcpy(scores, some.values, static_cast<size_t>(some.count) * sizeof(float));
  const Threshold threshold = find_threshold(scores, some.count, spare, p.top_k, count_of);
  return keep_from(some, threshold.value, some);
}

Candidates Row::keep_top_p(const Candidates& in, int64_t total) const {
  const auto target = static_cast<int64_t>(std::ceil(p.top_p * static_cast<double>(total)));
  // Half a weight and less counts as at most twice itself (rne), so that all values up to this bound sum to
  // less than (1 - top_p) * total: what is kept sums to top_p * total without them.
  const double rest = (1.0 - p.top_p) * static_cast<double>(total) / kFullWeight;
  const auto bound = static_cast<float>(0.49 * rest / static_cast<double>(in.count));
  const Candidates some = keep_from(in, bound, {kept, kept_ids, 0});
  std::memcpy(scores, some.values, static_cast<size_t>(some.count) * sizeof(float));
  const Threshold threshold = find_threshold(scores, some.count, spare, target, sum_weights);
  const Candidates out = keep_from(some, threshold.value, some);
  const int64_t weight = weight_of(threshold.value);
  if (sum_weights(out.values, out.count) - weight < target) return out;
  const int64_t needed = (target - threshold.above + weight - 1) / weight;
  return keep_first_equal(out, threshold.value, needed);
}

int64_t Row::draw(const Candidates& candidates, int64_t total) const {
  const auto product =
      static_cast<unsigned __int128>(p.random[index]) * static_cast<unsigned __int128>(total);
  auto target = static_cast<int64_t>(product >> 64);  // in [0, total)
  for (int64_t begin = 0;; begin += kDrawBlock) {
    const int64_t left = candidates.count - begin;
    const int64_t sum =
        sum_weights(candidates.values + begin, left < kDrawBlock ? left : kDrawBlock);
    if (target >= sum) {
      target -= sum;
      continue;
    }
    for (int64_t i = begin;; ++i) {
      target -= weight_of(candidates.values[i]);
      if (target < 0) return candidates.id(i);
    }
  }
}

void Row::write_weights(const Candidates& candidates) const {
  int64_t* out = p.weights + index * p.vocab;
  std::memset(out, 0, static_cast<size_t>(p.vocab) * sizeof(int64_t));
  for (int64_t i = 0; i < candidates.count; ++i) {
    out[candidates.id(i)] = weight_of(candidates.values[i]);
  }
}

int64_t Row::sample() const {
  const float* const logits = penalised();
  if (!score(logits)) return kSampleNotFinite;
  const float best = range_of(kept, num_maxima()).high;
  if (best == kMinusInf) return kSampleNoToken;
  if (is_greedy()) {
    const int64_t token = first_largest(logits, best);
    float one = 1.0f;
    auto id = static_cast<int32_t>(token);
    if (p.weights != nullptr) write_weights({&one, &id, 1});
    return token;
  }
  Candidates candidates{scores, nullptr, p.vocab};
  if (p.top_k > 0 && p.top_k < p.vocab) candidates = keep_top_k();
  for_each_vector(candidates.count, [&](int64_t i, int64_t n) {
    float* const values = candidates.values + i;
    store(values, exp_same(load(values, n) - set1(best)), n);
  });
  int64_t total = sum_weights(candidates.values, candidates.count);
  if (p.top_p < 1.0) {
    candidates = keep_top_p(candidates, total);
    total = sum_weights(candidates.values, candidates.count);
  }
  if (p.weights != nullptr) write_weights(candidates);
  return draw(candidates, total);
}

}  // namespace

Status sample(const SampleParams& p, const Threads& threads) {
  threads.parallel_for(p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) p.tokens[row] = Row(p, row).sample();
  });
  return Status::ok();
}

}  // namespace mambaquant::cpu::MBQ_ISA
