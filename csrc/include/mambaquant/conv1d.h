// causal_conv1d_quantize: depthwise causal convolution over int8, bias, SiLU, and back to int8.
//   acc[t,c] = sum_j weight[j,c] * x[t - width + 1 + j, c]                     (exact integer)
//   q[t,c] = epilogue(acc[t,c]), of conv_epilogue.h
// Before the sequence stand the width - 1 rows of initial_state, or zeros (x is symmetric, so that q = 0
// is the value 0).
//
// Step t of the walk meets token t, token seqlen - 1 - t with `reverse`, and with an `order` what that
// names in their place; the taps then meet the tokens of the steps before, and states are in the order
// of the walk, while q stays in that of x. `order` holds each of 0 to seqlen - 1 once. On CUDA, where
// nothing has looked at its values, a token outside the sequence is neither read (it counts as 0) nor
// written.
//
// The single-token update is the same call with seqlen 1 and initial_state == final_state.
#pragma once

#include "mambaquant/conv_epilogue.h"

namespace mambaquant {

struct CausalConv1dQuantizeParams : ConvEpilogueParams {
  int64_t batch = 0, seqlen = 0, width = 0;        // width 2, 3 or 4
  int64_t x_stride_batch = 0, x_stride_token = 0;  // elements; the last dim is contiguous
  const int8_t* x = nullptr;                       // (batch, seqlen, dim)
  const int8_t* weight = nullptr;                  // (width, dim), oldest tap first
  const int8_t* initial_state = nullptr;           // (batch, width - 1, dim), oldest first; or null
  int8_t* q = nullptr;                             // (batch, seqlen, dim), contiguous
  int8_t* final_state = nullptr;                   // (batch, width - 1, dim), oldest first
  const int32_t* order = nullptr;  // (seqlen,), the tokens in the order of the walk; or null
  bool reverse = false;            // walk from the last token (of `order`) to the first
};

namespace cpu {
Status causal_conv1d_quantize(const CausalConv1dQuantizeParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
Status causal_conv1d_quantize(const CausalConv1dQuantizeParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
