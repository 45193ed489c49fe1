// sample on exact-size buffers, against its definition with a sort: weights within float32 of exp in double, the
// kept set and the token exactly, and the same bits on every instruction set and with threads.
#include "mambaquant/sampling.h"

#include <limits>
#include <numeric>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Options {
  float temperature;
  int64_t top_k;
  double top_p;
  float penalty;
};

constexpr Options kOptions[] = {{0.0f, 0, 1.0, 1.0f},   {0.0f, 5, 0.5, 1.5f},
                                {1.0f, 0, 1.0, 1.0f},   {0.7f, 3, 1.0, 1.0f},
                                {1.0f, 70, 0.9, 1.0f},  {2.0f, 0, 0.5, 1.3f},
                                {1.0f, 0, 1e-12, 1.0f}, {1.0f, 1500, 0.999, 0.8f},
                                {1.0f, 1, 1.0, 1.0f},   {1.0f, 1000, 1.0, 1.0f}};

enum class Kind { kNormal, kTies, kHoles };

// The tensors of a call.
struct Call {
  Call(int64_t batch, int64_t vocab, const Options& options)
      : logits(batch * (vocab + 3)),
        seen(batch * vocab),
        num_seen(batch),
        random(batch),
        scores(batch * padded(vocab)),
        kept(batch * padded(vocab)),
        spare(batch * padded(vocab)),
        kept_ids(batch * padded(vocab)),
        tokens(batch),
        weights(batch * vocab) {
    p.batch = batch;
    p.vocab = vocab;
    p.logits_stride_row = vocab + 3;
    p.temperature = options.temperature;
    p.top_k = options.top_k;
    p.top_p = options.top_p;
    p.penalty = options.penalty;
    p.logits = logits.data();
    p.seen = seen.data();
    p.num_seen = num_seen.data();
    p.random = random.data();
    p.padded_vocab = padded(vocab);
    p.scores = scores.data();
    p.kept = kept.data();
    p.spare = spare.data();
    p.kept_ids = kept_ids.data();
    p.tokens = tokens.data();
    p.weights = weights.data();
  }
  static int64_t padded(int64_t vocab) { return (vocab + 15) / 16 * 16; }

  void fill(Kind kind) {
    Random numbers(static_cast<uint64_t>(p.vocab + 10 * static_cast<int64_t>(kind)));
    for (int64_t i = 0; i < logits.size(); ++i) {
      const float x = numbers.uniform(-9.0f, 9.0f);
      logits[i] = kind == Kind::kTies ? std::nearbyint(x / 3.0f) : x;
      if (kind == Kind::kHoles && numbers.integer(0, 2) == 0) logits[i] = -kInf;
    }
    for (int64_t row = 0; row < p.batch; ++row) {
      logits[row * p.logits_stride_row + p.vocab - 1] = 1.0f;  // never a row of holes alone
      random[row] = (static_cast<uint64_t>(numbers.bits()) << 32) | numbers.bits();
      num_seen[row] = p.vocab / 3;
      for (int64_t i = 0; i < p.vocab; ++i) {
        seen[row * p.vocab + i] = static_cast<int32_t>(p.vocab - 1 - i);
      }
    }
  }

  // The definition, for one row.
  std::vector<float> row_scores(int64_t row) const {
    const float* x = p.logits + row * p.logits_stride_row;
    std::vector<float> z(x, x + p.vocab);
    for (int64_t i = 0; i < p.num_seen[row] && p.penalty != 1.0f; ++i) {
      float& value = z[static_cast<size_t>(p.seen[row * p.vocab + i])];
      value = value < 0.0f ? value * p.penalty : value / p.penalty;
    }
    if (p.temperature != 0.0f) {
      for (float& value : z) value /= p.temperature;
    }
    return z;
  }
  int64_t weight(int64_t row, int64_t i) const { return weights[row * p.vocab + i]; }

  SampleParams p;
  Buffer<float> logits;
  Buffer<int32_t> seen;
  Buffer<int64_t> num_seen;
  Buffer<uint64_t> random;
  Buffer<float> scores, kept, spare;
  Buffer<int32_t> kept_ids;
  Buffer<int64_t> tokens, weights;
};

void check_greedy(const Call& call, int64_t row, const std::vector<float>& z) {
  const auto best = std::max_element(z.begin(), z.end()) - z.begin();
  CHECK(call.tokens[row] == best);
  for (int64_t i = 0; i < call.p.vocab; ++i) CHECK((call.weight(row, i) != 0) == (i == best));
}

// Ids in the order in which they are kept.
std::vector<int64_t> falling(const std::vector<float>& z) {
  std::vector<int64_t> order(z.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return z[static_cast<size_t>(a)] > z[static_cast<size_t>(b)];
  });
  return order;
}

void check_sampled(const Call& call, int64_t row, const std::vector<float>& z) {
  const SampleParams& p = call.p;
  const std::vector<int64_t> order = falling(z);
  const auto score = [&](int64_t rank) {
    return z[static_cast<size_t>(order[static_cast<size_t>(rank)])];
  };
  const int64_t k = p.top_k == 0 ? p.vocab : std::min(p.top_k, p.vocab);
  double total = 0.0;
  for (int64_t rank = 0; rank < p.vocab && score(rank) >= score(k - 1); ++rank) {
    total += std::exp(static_cast<double>(score(rank)) - static_cast<double>(score(0)));
  }
  double before = 0.0;
  for (int64_t rank = 0; rank < p.vocab; ++rank) {
    const int64_t weight = call.weight(row, order[static_cast<size_t>(rank)]);
    const double e = std::exp(static_cast<double>(score(rank)) - static_cast<double>(score(0)));
    const double limit = p.top_p * total;
    // Where float64 cannot tell which side of the limit a token is on, either will do.
    const bool is_near = std::fabs(before - limit) < 1e-5 * total;
    const bool is_kept = score(rank) >= score(k - 1) && (p.top_p == 1.0 || before < limit);
    if (is_kept) before += e;
    if (is_near && p.top_p < 1.0) continue;
    const double expected = is_kept ? e * 0x1p40 : 0.0;
    if (!CHECK(std::fabs(static_cast<double>(weight) - expected) <= 2e-6 * expected + 0.5)) return;
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < p.vocab; ++i) sum += call.weight(row, i);
  const auto product =
      static_cast<unsigned __int128>(p.random[row]) * static_cast<unsigned __int128>(sum);
  auto target = static_cast<int64_t>(product >> 64);
  int64_t token = 0;
  while (target >= call.weight(row, token)) target -= call.weight(row, token++);
  CHECK(call.tokens[row] == token);
}

void run(Call& call, const Threads& threads) { CHECK(cpu::sample(call.p, threads).is_ok()); }

void test_definition() {
  for (const int64_t vocab : {1, 2, 15, 16, 17, 64, 65, 513, 1024, 1025, 2600}) {
    for (const Options& options : kOptions) {
      for (const Kind kind : {Kind::kNormal, Kind::kTies, Kind::kHoles}) {
        Call call(3, vocab, options);
        call.fill(kind);
        run(call, threaded(2));
        for (int64_t row = 0; row < 3; ++row) {
          const std::vector<float> z = call.row_scores(row);
          options.temperature == 0.0f ? check_greedy(call, row, z) : check_sampled(call, row, z);
        }
        Call serially(3, vocab, options), scalar(3, vocab, options);
        serially.fill(kind);
        run(serially, serial());
        CHECK(same_bytes(serially.tokens, call.tokens) &&
              same_bytes(serially.weights, call.weights));
        const cpu::Isa isa = cpu::current_isa();
        CHECK(cpu::force_isa(cpu::Isa::kScalar).is_ok());
        scalar.fill(kind);
        run(scalar, serial());
        CHECK(cpu::force_isa(isa).is_ok());
        CHECK(same_bytes(scalar.tokens, call.tokens) && same_bytes(scalar.weights, call.weights));
      }
    }
  }
}

void test_rows_without_an_answer() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t vocab : {1, 16, 1030}) {
    for (const Options& options : kOptions) {
      Call call(4, vocab, options);
      call.fill(Kind::kNormal);
      std::fill_n(call.logits.data() + call.p.logits_stride_row, vocab, -kInf);
      call.logits[2 * call.p.logits_stride_row + vocab / 2] = nan;
      call.logits[3 * call.p.logits_stride_row + vocab - 1] = kInf;
      run(call, serial());
      CHECK(call.tokens[0] >= 0);
      CHECK(call.tokens[1] == kSampleNoToken);
      CHECK(call.tokens[2] == kSampleNotFinite && call.tokens[3] == kSampleNotFinite);
    }
  }
}

// The ends of the range of random numbers are the first and the last token that has a weight.
void test_ends_of_the_range() {
  Call call(2, 100, {1.0f, 0, 1.0, 1.0f});
  call.fill(Kind::kNormal);
  for (int64_t row = 0; row < 2; ++row) {
    call.logits[row * call.p.logits_stride_row] = -kInf;
    call.logits[row * call.p.logits_stride_row + 99] = -kInf;
  }
  call.random[0] = 0;
  call.random[1] = std::numeric_limits<uint64_t>::max();
  run(call, serial());
  CHECK(call.tokens[0] == 1);
  CHECK(call.tokens[1] == 98);
}

}  // namespace

int main() {
  for_each_isa(test_definition);
  for_each_isa(test_rows_without_an_answer);
  for_each_isa(test_ends_of_the_range);
  return result();
}
