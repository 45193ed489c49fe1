// language_model: some tokens of a Mamba language model, or of a few of its blocks, in one call on the
// kernels of this folder.
//   embedding, or a given stream -> blocks -> the stream, or of the last token of each sequence
//   norm -> int8 head
// A block is
//   norm -> int8 -> in_proj -> int8 (x | z)
//   x: conv, SiLU -> int8 -> x_proj -> int8 (dt | B | C); dt -> dt_proj -> float32
//      -> scan with softplus, read-out, D, S-SiLU gate(z) -> float32
//   -> (Hadamard) -> int8 -> out_proj + residual stream
// in the arithmetic of each kernel's own header, so that the residual stream has the bits that the
// kernels give when they are called one by one.
//
// Long inputs go through the layers in chunks of kChunkRows tokens, which keeps a layer's weights in
// L3 from block to block, and a chunk through a layer in blocks of kBlockRows tokens, which keeps
// their activations in L2. The memory that a call needs does not depend on seqlen.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

// A packed int8 weight and its epilogue.
struct LinearWeight {
  int64_t n = 0, k = 0;
  const int8_t* packed = nullptr;       // pack_gemm_weight on the ISA in use
  const float* scale = nullptr;         // (n,)
  const int32_t* acc_offset = nullptr;  // (n,) or null
  const float* bias = nullptr;          // (n,) or null
};

struct LanguageBlock {
  float norm_eps = 0.0f;
  const float* norm_weight = nullptr;  // (hidden,) or null: 1
  const float* in_scale = nullptr;     // (1,)
  LinearWeight in_proj;                // (2 dim, hidden)
  const float* xz_scale = nullptr;     // (2 dim,)

  const int8_t* conv_weight = nullptr;       // (width, dim)
  const float* conv_weight_scale = nullptr;  // (dim,)
  const float* conv_bias = nullptr;          // (dim,) or null
  const float* x_scale = nullptr;            // (dim,), of the conv's output
  const int32_t* x_zero_point = nullptr;     // (dim,)

  LinearWeight x_proj;                // (dt_rank + 2 dstate, dim)
  const float* one = nullptr;         // (1,), 1.0f: x_proj's columns carry x's scales
  const float* dtBC_scale = nullptr;  // (dt_rank + 2 dstate,); one value for dt, one for C
  LinearWeight dt_proj;               // (dim, dt_rank)

  const float* dt_bias = nullptr;        // (dim,)
  const float* A = nullptr;              // (dstate, dim)
  const float* D = nullptr;              // (dim,)
  const float* readout_scale = nullptr;  // (dim,), or null: float read-out
  const float* gate_scale = nullptr;     // (dim,)

  const float* out_scale = nullptr;  // (1,)
  LinearWeight out_proj;             // (hidden, dim)
};

struct LanguageModel {
  int64_t hidden = 0, dim = 0, dstate = 0, dt_rank = 0, width = 0, vocab = 0;
  int64_t hadamard_base_order = 0;  // of dim; 0: out_proj's input is not rotated
  bool rotate_state = false;
  int64_t num_blocks = 0;
  const LanguageBlock* blocks = nullptr;

  DType embedding_dtype = DType::kI8;
  const void* embedding = nullptr;         // (vocab, hidden) or null: streams alone
  const float* embedding_scale = nullptr;  // (vocab,) or null

  float head_norm_eps = 0.0f;
  const float* head_norm_weight = nullptr;  // (hidden,); null: no head
  const float* head_scale = nullptr;        // (1,), of the head's input
  LinearWeight head;                        // (vocab, hidden)
};

struct LanguageModelParams {
  const LanguageModel* model = nullptr;
  int64_t batch = 0, seqlen = 0;
  const int64_t* ids = nullptr;  // (batch, seqlen), contiguous, in [0, vocab); or null
  const float* x = nullptr;  // (batch, seqlen, hidden), contiguous: the stream, where ids is null
  int8_t* conv_state = nullptr;  // (num_blocks, batch, width - 1, dim), read and written
  float* ssm_state = nullptr;    // (num_blocks, batch, dstate, dim), read and written
  float* y = nullptr;            // (batch, seqlen, hidden): the stream behind the blocks; or null
  float* last = nullptr;         // (batch, hidden): of the last tokens; or null
  float* logits = nullptr;       // (batch, vocab): of the last tokens; or null
  int8_t* workspace = nullptr;   // (language_model_workspace_bytes(...),), 64-byte aligned
};

// Tokens, of all sequences together, that go through a layer before the next layer.
inline constexpr int64_t kChunkRows = 512;
// Tokens whose activations stay in cache from in_proj to out_proj.
inline constexpr int64_t kBlockRows = 128;

namespace cpu {
int64_t language_model_workspace_bytes(const LanguageModel& model, int64_t batch, int64_t seqlen,
                                       int64_t num_threads);
Status language_model(const LanguageModelParams& p, const Threads& threads);
}  // namespace cpu

}  // namespace mambaquant
