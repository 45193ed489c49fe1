#include "torch/sampler.h"

#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <cmath>
#include <vector>

#include "mambaquant/sampling.h"
#include "torch/backend.h"
#include "torch/checks.h"

namespace mambaquant::binding {
namespace {

constexpr OpName kOp{"Sampler"};
constexpr int64_t kWidestVector = 16;  // floats

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): number t of the stream with seed s is mix(s + (t + 1) * golden).
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
// Each sequence has its own stream, whose seed is a number of the stream of `seed`: a sequence draws the same alone
// and in a batch.
uint64_t random_bits(uint64_t seed, uint64_t sequence, uint64_t step) {
  return mix(mix(seed + (sequence + 1) * kGolden) + (step + 1) * kGolden);
}

class SamplerHolder : public torch::CustomClassHolder {
 public:
  SamplerHolder(int64_t batch, int64_t vocab, double temperature, int64_t top_k, double top_p,
                double repetition_penalty, int64_t seed)
      : seed_(static_cast<uint64_t>(seed)) {
    TORCH_CHECK_VALUE(batch >= 1, kOp.name, ": expected a batch of at least 1, got ", batch);
    TORCH_CHECK_VALUE(vocab >= 1 && vocab <= kMaxSampleVocab, kOp.name,
                      ": expected a vocabulary of 1 to ", kMaxSampleVocab, ", got ", vocab);
    TORCH_CHECK_VALUE(temperature >= 0.0 && std::isfinite(temperature), kOp.name,
                      ": expected a finite temperature of at least 0, got ", temperature);
    TORCH_CHECK_VALUE(top_k >= 0, kOp.name, ": expected top_k of at least 0, got ", top_k);
    TORCH_CHECK_VALUE(top_p > 0.0 && top_p <= 1.0, kOp.name,
                      ": expected top_p above 0 and at most 1, got ", top_p);
    TORCH_CHECK_VALUE(repetition_penalty > 0.0 && std::isfinite(repetition_penalty), kOp.name,
                      ": expected a finite repetition_penalty above 0, got ", repetition_penalty);
    p_.batch = batch;
    p_.vocab = vocab;
    p_.temperature = static_cast<float>(temperature);
    p_.top_k = top_k;
    p_.top_p = top_p;
    p_.penalty = static_cast<float>(repetition_penalty);
    allocate();
  }

  // ids: (batch, n), int64. They count as repeated from now on, as every sampled token does.
  void observe(const Tensor& ids) {
    check_dim(kOp, ids, 2, "ids");
    check_parameter(kOp, ids, at::kLong, {p_.batch, ids.size(1)}, scores_, "ids", "(batch, n)");
    const int64_t* values = ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.numel(); ++i) {
      TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < p_.vocab, kOp.name, ": expected ids below ",
                        p_.vocab, ", got ", values[i]);
    }
    if (p_.penalty == 1.0f) return;
    for (int64_t i = 0; i < ids.numel(); ++i) see(i / ids.size(1), values[i]);
  }

  // logits: (batch, vocab), float32, to tokens: (batch, 1), int64.
  void sample(const Tensor& logits, const Tensor& tokens) {
    check_parameter(kOp, tokens, at::kLong, {p_.batch, 1}, scores_, "tokens", "(batch, 1)");
    int64_t* const out = tokens.mutable_data_ptr<int64_t>();
    run(logits, out, nullptr);
    ++step_;
    if (p_.penalty == 1.0f) return;
    for (int64_t row = 0; row < p_.batch; ++row) see(row, out[row]);
  }

  // What sample() would draw from, and nothing drawn: (batch, vocab), int64, in units that sum to no certain number.
  Tensor weights(const Tensor& logits) {
    Tensor out = at::empty({p_.batch, p_.vocab}, at::kLong);
    std::vector<int64_t> tokens(random_.size());
    run(logits, tokens.data(), out.mutable_data_ptr<int64_t>());
    return out;
  }

 private:
  void allocate() {
    p_.padded_vocab = (p_.vocab + kWidestVector - 1) / kWidestVector * kWidestVector;
    const std::vector<int64_t> shape = {p_.batch, p_.padded_vocab};
    scores_ = at::empty(shape, at::kFloat);
    kept_ = at::empty(shape, at::kFloat);
    spare_ = at::empty(shape, at::kFloat);
    kept_ids_ = at::empty(shape, at::kInt);
    random_.resize(static_cast<size_t>(p_.batch));
    p_.scores = scores_.mutable_data_ptr<float>();
    p_.kept = kept_.mutable_data_ptr<float>();
    p_.spare = spare_.mutable_data_ptr<float>();
    p_.kept_ids = kept_ids_.mutable_data_ptr<int32_t>();
    p_.random = random_.data();
    if (p_.penalty == 1.0f) return;
    const auto ids = static_cast<size_t>(p_.batch * p_.vocab);
    is_seen_.resize(ids);
    seen_.resize(ids);
    num_seen_.resize(static_cast<size_t>(p_.batch));
    p_.seen = seen_.data();
    p_.num_seen = num_seen_.data();
  }

  void see(int64_t row, int64_t id) {
    const auto at = static_cast<size_t>(row * p_.vocab + id);
    if (is_seen_[at]) return;
    is_seen_[at] = true;
    int64_t& count = num_seen_[static_cast<size_t>(row)];
    seen_[static_cast<size_t>(row * p_.vocab + count)] = static_cast<int32_t>(id);
    ++count;
  }

  void run(const Tensor& logits, int64_t* tokens, int64_t* weights) {
    check_dtype(kOp, logits, at::kFloat, "logits");
    check_shape(kOp, logits, {p_.batch, p_.vocab}, "logits", "(batch, vocab)");
    check_device(kOp, logits, scores_, "logits");
    check_last_dim_contiguous(kOp, logits, "logits");
    for (size_t row = 0; row < random_.size(); ++row) random_[row] = random_bits(seed_, row, step_);
    p_.logits = logits.const_data_ptr<float>();
    p_.logits_stride_row = logits.stride(0);
    p_.tokens = tokens;
    p_.weights = weights;
    check_status(kOp, cpu::sample(p_, torch_threads()));
    for (int64_t row = 0; row < p_.batch; ++row) {
      TORCH_CHECK_VALUE(tokens[row] != kSampleNotFinite, kOp.name,
                        ": expected logits that are finite or -inf, got NaN or +inf in row ", row);
      TORCH_CHECK_VALUE(tokens[row] != kSampleNoToken, kOp.name,
                        ": expected a logit above -inf, got none in row ", row);
    }
  }

  const uint64_t seed_;
  uint64_t step_ = 0;
  SampleParams p_;
  Tensor scores_, kept_, spare_, kept_ids_;
  std::vector<uint64_t> random_;
  std::vector<bool> is_seen_;
  std::vector<int32_t> seen_;
  std::vector<int64_t> num_seen_;
};

}  // namespace

void register_sampler(torch::Library& m) {
  m.class_<SamplerHolder>("Sampler")
      .def(torch::init<int64_t, int64_t, double, int64_t, double, double, int64_t>())
      .def("observe", &SamplerHolder::observe)
      .def("sample", &SamplerHolder::sample)
      .def("weights", &SamplerHolder::weights);
}

}  // namespace mambaquant::binding
