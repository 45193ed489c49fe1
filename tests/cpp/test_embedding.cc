// embedding against its definition, in bits, on exact-size buffers.
#include "mambaquant/embedding.h"

#include "check.h"
#include "mambaquant/dispatch.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

constexpr int64_t kVocab = 9;

void test_int8(int64_t tokens, int64_t dim, const Threads& threads) {
  Random random(static_cast<uint64_t>(tokens * 100 + dim));
  Buffer<int8_t> table(kVocab * dim);
  Buffer<float> scale(kVocab), out(tokens * dim);
  Buffer<int64_t> ids(tokens);
  fill_int8(table, random, kQMinAsymmetric);
  fill_uniform(scale, random, 0.01f, 2.0f);
  for (int64_t t = 0; t < tokens; ++t) ids[t] = random.integer(0, kVocab - 1);
  EmbeddingParams p;
  p.tokens = tokens;
  p.dim = dim;
  p.ids = ids.data();
  p.table = table.data();
  p.scale = scale.data();
  p.out = out.data();
  CHECK(cpu::embedding(p, threads).is_ok());
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < dim; ++c) {
      CHECK(out[t * dim + c] == static_cast<float>(table[ids[t] * dim + c]) * scale[ids[t]]);
    }
  }
}

// Halves whose value is known by their bits: +-(1 + f / 1024).
void test_float16(int64_t dim) {
  Random random(static_cast<uint64_t>(dim));
  Buffer<Float16> table(kVocab * dim);
  Buffer<int64_t> ids(kVocab);
  Buffer<float> out(kVocab * dim);
  for (int64_t i = 0; i < table.size(); ++i) {
    table[i] = {static_cast<uint16_t>((random.bits() & 0x83ffu) | 0x3c00u)};
  }
  for (int64_t t = 0; t < kVocab; ++t) ids[t] = kVocab - 1 - t;
  EmbeddingParams p;
  p.tokens = kVocab;
  p.dim = dim;
  p.table_dtype = DType::kF16;
  p.ids = ids.data();
  p.table = table.data();
  p.out = out.data();
  CHECK(cpu::embedding(p, serial()).is_ok());
  for (int64_t t = 0; t < kVocab; ++t) {
    for (int64_t c = 0; c < dim; ++c) {
      const uint16_t bits = table[ids[t] * dim + c].bits;
      const float value = 1.0f + static_cast<float>(bits & 0x3ffu) / 1024.0f;
      CHECK(out[t * dim + c] == ((bits & 0x8000u) != 0 ? -value : value));
    }
  }
}

}  // namespace

int main() {
  for_each_isa([] {
    for (const int64_t dim : {1, 5, 16, 48, 67}) {
      for (const int64_t tokens : {0, 1, 6}) test_int8(tokens, dim, serial());
      test_float16(dim);
    }
    test_int8(2000, 48, threaded(3));
  });
  return result();
}
