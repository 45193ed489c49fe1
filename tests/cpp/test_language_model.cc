// language_model on exact-size buffers: the same bits however the tokens are cut into calls, however many
// sequences stand beside each other, and whatever threads there are. What the kernels compute is tested
// with them; that the model is theirs, one after another, in tests/stages/test_runner.py.
#include "mambaquant/language_model.h"

#include <memory>
#include <vector>

#include "check.h"
#include "mambaquant/gemm.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

constexpr int64_t kHidden = 24, kDim = 48, kRank = 5, kWidth = 4, kVocab = 33, kBlocks = 2;

// Random tensors, kept alive.
class Store {
 public:
  explicit Store(uint64_t seed) : random(seed) {}

  const float* floats(int64_t count, float low, float high) {
    float_.push_back(std::make_unique<Buffer<float>>(count));
    fill_uniform(*float_.back(), random, low, high);
    return float_.back()->data();
  }
  const int8_t* bytes(int64_t count) {
    int8_.push_back(std::make_unique<Buffer<int8_t>>(count));
    fill_int8(*int8_.back(), random);
    return int8_.back()->data();
  }
  const int32_t* zero_points(int64_t count) {
    int32_.push_back(std::make_unique<Buffer<int32_t>>(count));
    for (int64_t i = 0; i < count; ++i) (*int32_.back())[i] = random.integer(-20, 20);
    return int32_.back()->data();
  }
  LinearWeight linear(int64_t n, int64_t k) {
    LinearWeight w;
    w.n = n;
    w.k = k;
    int8_.push_back(std::make_unique<Buffer<int8_t>>(packed_gemm_weight_bytes(n, k)));
    int8_t* const packed = int8_.back()->data();
    PackGemmWeightParams p;
    p.n = n;
    p.k = k;
    p.weight_stride_row = k;
    p.weight = bytes(n * k);
    p.packed = packed;
    CHECK(cpu::pack_gemm_weight(p, serial()).is_ok());
    w.packed = packed;
    w.scale = floats(n, 0.0005f, 0.001f);
    w.bias = floats(n, -0.1f, 0.1f);
    return w;
  }

  Random random;

 private:
  std::vector<std::unique_ptr<Buffer<float>>> float_;
  std::vector<std::unique_ptr<Buffer<int8_t>>> int8_;
  std::vector<std::unique_ptr<Buffer<int32_t>>> int32_;
};

struct Model {
  Model(int64_t dstate, bool is_rotated, bool is_float_readout) : store(7) {
    model.hidden = kHidden;
    model.dim = kDim;
    model.dstate = dstate;
    model.dt_rank = kRank;
    model.width = kWidth;
    model.vocab = kVocab;
    model.hadamard_base_order = is_rotated ? 12 : 0;
    model.rotate_state = is_rotated && !is_float_readout;
    model.embedding = store.bytes(kVocab * kHidden);
    model.embedding_scale = store.floats(kVocab, 0.005f, 0.02f);
    model.head_norm_eps = 1e-5f;
    model.head_norm_weight = store.floats(kHidden, 0.5f, 1.5f);
    model.head_scale = store.floats(1, 0.02f, 0.03f);
    model.head = store.linear(kVocab, kHidden);
    for (int64_t i = 0; i < kBlocks; ++i) blocks.push_back(block(dstate, is_float_readout));
    model.num_blocks = kBlocks;
    model.blocks = blocks.data();
  }

  LanguageBlock block(int64_t dstate, bool is_float_readout) {
    LanguageBlock b;
    b.norm_eps = 1e-5f;
    b.norm_weight = store.floats(kHidden, 0.5f, 1.5f);
    b.in_scale = store.floats(1, 0.02f, 0.03f);
    b.in_proj = store.linear(2 * kDim, kHidden);
    b.xz_scale = store.floats(2 * kDim, 0.02f, 0.04f);
    b.conv_weight = store.bytes(kWidth * kDim);
    b.conv_weight_scale = store.floats(kDim, 0.002f, 0.004f);
    b.conv_bias = store.floats(kDim, -0.2f, 0.2f);
    b.x_scale = store.floats(kDim, 0.01f, 0.03f);
    b.x_zero_point = store.zero_points(kDim);
    b.x_proj = store.linear(kRank + 2 * dstate, kDim);
    b.one = &one;
    b.dtBC_scale = store.floats(kRank + 2 * dstate, 0.01f, 0.02f);
    b.dt_proj = store.linear(kDim, kRank);
    b.dt_bias = store.floats(kDim, -4.0f, -1.0f);
    b.A = store.floats(dstate * kDim, -8.0f, -0.5f);
    b.D = store.floats(kDim, -1.0f, 1.0f);
    if (!is_float_readout) b.readout_scale = store.floats(kDim, 0.001f, 0.01f);
    b.gate_scale = store.floats(kDim, 0.5f, 1.5f);
    b.out_scale = store.floats(1, 0.01f, 0.02f);
    b.out_proj = store.linear(kHidden, kDim);
    return b;
  }

  Store store;
  LanguageModel model;
  std::vector<LanguageBlock> blocks;
  float one = 1.0f;
};

// State and results of a few sequences.
struct Session {
  Session(const LanguageModel& model, int64_t sequences)
      : m(model),
        batch(sequences),
        conv(kBlocks * batch * (kWidth - 1) * kDim),
        ssm(kBlocks * batch * m.dstate * kDim),
        hidden(batch * kHidden),
        logits(batch * kVocab) {
    conv.fill(0);
    ssm.fill(0.0f);
  }

  // The tokens [begin, end) of each row of ids.
  void read(const std::vector<std::vector<int64_t>>& ids, int64_t begin, int64_t end,
            const Threads& threads) {
    Buffer<int64_t> part(batch * (end - begin));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = begin; t < end; ++t) {
        part[b * (end - begin) + t - begin] = ids[static_cast<size_t>(b)][static_cast<size_t>(t)];
      }
    }
    LanguageModelParams p;
    p.model = &m;
    p.batch = batch;
    p.seqlen = end - begin;
    p.ids = part.data();
    p.conv_state = conv.data();
    p.ssm_state = ssm.data();
    p.last = hidden.data();
    p.logits = logits.data();
    const int64_t bytes =
        cpu::language_model_workspace_bytes(m, batch, p.seqlen, threads.num_threads);
    std::vector<int8_t> room(static_cast<size_t>(bytes + 63));
    auto address = reinterpret_cast<uintptr_t>(room.data());
    p.workspace = room.data() + (64 - address % 64) % 64;
    CHECK(cpu::language_model(p, threads).is_ok());
  }

  bool equals(const Session& other) const {
    return same_bytes(conv, other.conv) && same_bytes(ssm, other.ssm) &&
           same_bytes(hidden, other.hidden) && same_bytes(logits, other.logits);
  }

  // Whether sequence b ended as the only one of `alone`.
  bool has(int64_t b, const Session& alone) const {
    bool is_equal = true;
    for (int64_t i = 0; i < kVocab; ++i) is_equal &= logits[b * kVocab + i] == alone.logits[i];
    for (int64_t i = 0; i < kHidden; ++i) is_equal &= hidden[b * kHidden + i] == alone.hidden[i];
    return is_equal;
  }

  const LanguageModel& m;
  int64_t batch;
  Buffer<int8_t> conv;
  Buffer<float> ssm, hidden, logits;
};

std::vector<std::vector<int64_t>> random_ids(int64_t batch, int64_t seqlen) {
  Random random(static_cast<uint64_t>(batch * 1000 + seqlen));
  std::vector<std::vector<int64_t>> ids(static_cast<size_t>(batch));
  for (auto& row : ids) {
    for (int64_t t = 0; t < seqlen; ++t) row.push_back(random.integer(0, kVocab - 1));
  }
  return ids;
}

void test_cuts(const LanguageModel& m, int64_t batch, int64_t seqlen) {
  const auto ids = random_ids(batch, seqlen);
  Session whole(m, batch), cut(m, batch), parallel(m, batch);
  whole.read(ids, 0, seqlen, serial());
  bool is_moving = false;
  for (int64_t i = 0; i < whole.logits.size(); ++i) is_moving |= whole.logits[i] != 0.0f;
  CHECK(is_moving);
  for (int64_t begin = 0, steps = 1; begin < seqlen; begin += steps, steps = steps * 2 + 1) {
    if (steps > seqlen - begin) steps = seqlen - begin;
    cut.read(ids, begin, begin + steps, serial());
  }
  CHECK(cut.equals(whole));
  parallel.read(ids, 0, seqlen, threaded(3));
  CHECK(parallel.equals(whole));
  for (int64_t b = 0; b < batch && b < 3; ++b) {
    Session alone(m, 1);
    alone.read({ids[static_cast<size_t>(b)]}, 0, seqlen, serial());
    CHECK(whole.has(b, alone));
  }
}

// Refused before anything is read: all pointers are null.
void test_refusals(const LanguageModel& good) {
  const auto is_refused = [](const LanguageModel& m, int64_t seqlen) {
    LanguageModelParams p;
    p.model = &m;
    p.batch = 1;
    p.seqlen = seqlen;
    return cpu::language_model(p, serial()).code == Status::Code::kUnsupported;
  };
  CHECK(is_refused(good, 0));
  LanguageModel wide = good, deep = good, large = good;
  wide.width = 5;
  deep.dstate = 512;
  large.dim = 1 << 17;
  CHECK(is_refused(wide, 1) && is_refused(deep, 1) && is_refused(large, 1));
}

}  // namespace

int main() {
  for_each_isa([] {
    const Model rotated(16, true, false);
    test_cuts(rotated.model, 1, 1);
    test_cuts(rotated.model, 1, 150);  // two blocks of tokens
    test_cuts(rotated.model, 1, 530);  // two chunks
    test_cuts(rotated.model, 5, 40);   // blocks of several sequences, the last of them smaller
    test_cuts(rotated.model, 3, 200);  // a chunk of each sequence in two blocks
    test_cuts(rotated.model, 140, 2);  // more sequences than a block has rows
    const Model plain(6, false, false);
    test_cuts(plain.model, 2, 70);
    const Model float_readout(16, false, true);
    test_cuts(float_readout.model, 2, 70);
    test_refusals(rotated.model);
  });
  return result();
}
