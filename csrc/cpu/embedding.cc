// embedding. Bound: bytes, one row read and one written; a token's row is a few hundred bytes in a
// table of megabytes, so that its first line waits for memory and the rest for the prefetcher.
#include "mambaquant/embedding.h"

#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kElementsPerTask = 16384;

template <typename T>
Status embedding_typed(const EmbeddingParams& p, const Threads& threads) {
  const int64_t grain = kElementsPerTask / (p.dim + 1) + 1;
  threads.parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = static_cast<const T*>(p.table) + p.ids[t] * p.dim;
      const F32 scale = set1(p.scale == nullptr ? 1.0f : p.scale[p.ids[t]]);
      float* out = p.out + t * p.dim;
      int64_t c = 0;
      for (; c + kLanes <= p.dim; c += kLanes) store(out + c, load(row + c) * scale);
      if (c < p.dim) store(out + c, load(row + c, p.dim - c) * scale, p.dim - c);
    }
  });
  return Status::ok();
}

}  // namespace

Status embedding(const EmbeddingParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT_OR_INT8(p.table_dtype, [&](auto tag) {
    return embedding_typed<typename decltype(tag)::type>(p, threads);
  });
}

}  // namespace mambaquant::cpu::MBQ_ISA
