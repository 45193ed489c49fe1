// embedding: rows of a table, as float32.
//   out[t,c] = table[ids[t], c] * scale[ids[t]]          scale null: 1
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

struct EmbeddingParams {
  int64_t tokens = 0, dim = 0;
  DType table_dtype = DType::kI8;  // or a float type
  const int64_t* ids = nullptr;    // (tokens,), each a row of the table
  const void* table = nullptr;     // (vocab, dim), contiguous
  const float* scale = nullptr;    // (vocab,) or null
  float* out = nullptr;            // (tokens, dim), contiguous
};

namespace cpu {
Status embedding(const EmbeddingParams& p, const Threads& threads);
}  // namespace cpu

}  // namespace mambaquant
