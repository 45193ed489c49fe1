// sample: the next token of each sequence from its logits, by the processors that transformers has, in
// their order. Each row by itself:
//   x[i] = logits[i], and for every i in seen: x[i] * penalty where x[i] < 0, else x[i] / penalty
//   temperature 0: the first i with the largest x[i]. Otherwise
//   z[i] = x[i] / temperature
//   top_k > 0: i stays where z[i] >= the k-th largest z (all that equal it stay)
//   e[i] = exp(z[i] - max z), at most 2 ulp off; 0 for what did not stay
//   w[i] = rne(e[i] * 2^40), an integer: what e stands for in everything below
//   top_p < 1: in the order of falling e, then of rising i, i stays while the weights before it sum to
//     less than top_p * sum of w
//   token = the first i with w[0] + ... + w[i] > floor(random * sum of w / 2^64), over what stayed
// Everything after the logits is float32 rounded once an operation, without fma, or an integer sum: the
// same bits on every instruction set, and whatever the number of threads.
//
// Nothing is sorted: thresholds are found by halving the range of float32 in which they lie, over the
// candidates that are left in it.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

inline constexpr int32_t kSampleWeightBits = 40;     // of the fraction of a weight
inline constexpr int64_t kMaxSampleVocab = 1 << 22;  // so that sums of weights stay below 2^63

// Of `tokens`, where a row has none.
inline constexpr int64_t kSampleNotFinite = -1;  // NaN or +inf among the scores
inline constexpr int64_t kSampleNoToken = -2;    // all logits are -inf

struct SampleParams {
  int64_t batch = 0, vocab = 0;
  int64_t logits_stride_row = 0;
  float temperature = 0.0f;           // 0: greedy
  int64_t top_k = 0;                  // 0: off
  double top_p = 1.0;                 // in (0, 1]; 1: off
  float penalty = 1.0f;               // above 0; 1: off
  const float* logits = nullptr;      // (batch, vocab), each row contiguous
  const int32_t* seen = nullptr;      // (batch, vocab), distinct ids; unless penalty is 1
  const int64_t* num_seen = nullptr;  // (batch,)
  const uint64_t* random = nullptr;   // (batch,), uniform in [0, 2^64); unless greedy
  int64_t padded_vocab = 0;           // vocab, rounded up to a multiple of 16
  float* scores = nullptr;            // scratch: each (batch, padded_vocab)
  float* kept = nullptr;
  float* spare = nullptr;
  int32_t* kept_ids = nullptr;
  int64_t* tokens = nullptr;   // (batch,)
  int64_t* weights = nullptr;  // (batch, vocab) or null: also w of all that stayed, the rest 0
};

namespace cpu {
Status sample(const SampleParams& p, const Threads& threads);
}  // namespace cpu

}  // namespace mambaquant
