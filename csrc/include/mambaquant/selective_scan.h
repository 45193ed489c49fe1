// selective_scan: Mamba's recurrence over int8 operands with a float32 state, its read-out, skip
// and gate.
//   x_f = (x - x_zero_point[e]) * x_scale[e],  dt_f = softplus(dt + dt_bias[e])
//   h[n] = exp(dt_f * A[n,e]) * h[n] + (dt_f * x_f) * B[n]
//   y = sum_n h[n] * C[n]                                                     readout_scale null
//   y = (sum_n qh[n] * qC[n]) * (readout_scale[e] * C_scale)                  readout_scale given,
//   C int8
//       qh[n] = clamp(rne(hr[n] * inv_readout_scale[e]), -127, 127), hr = h, or h H / sqrt(dstate)
//   y += D[e] * x_f;  y += addend;  y *= z * sigmoid(gate_scale[e] * z)
// The state h is never quantized. H is the Sylvester Hadamard matrix over the dstate states.
//
// The walk visits the tokens in storage order, or by a permutation: step t is at token order[t] of every
// operand and of y. In reverse, it starts at step seqlen - 1.
//
// The single-token update is the same call with seqlen 1 and initial_state == final_state.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

inline constexpr int64_t kMaxDState = 256;

struct SelectiveScanParams {
  int64_t batch = 0, seqlen = 0, dim = 0, dstate = 0;
  int64_t x_stride_batch = 0, x_stride_token = 0;  // elements; the last dim is contiguous
  int64_t dt_stride_batch = 0, dt_stride_token = 0;
  int64_t z_stride_batch = 0, z_stride_token = 0;
  int64_t addend_stride_batch = 0, addend_stride_token = 0;
  int64_t B_stride_batch = 0, B_stride_token = 0;
  int64_t C_stride_batch = 0, C_stride_token = 0;
  DType dt_dtype = DType::kF32;                                               // kF32, kF16 or kBF16
  DType B_dtype = DType::kF32, C_dtype = DType::kF32, z_dtype = DType::kF32;  // or kI8
  DType addend_dtype = DType::kF32, y_dtype = DType::kF32;
  const int8_t* x = nullptr;              // (batch, seqlen, dim)
  const float* x_scale = nullptr;         // (dim,)
  const int32_t* x_zero_point = nullptr;  // (dim,) or null
  const void* dt = nullptr;               // (batch, seqlen, dim), before softplus
  const float* dt_bias = nullptr;         // (dim,) or null
  const float* A = nullptr;               // (dstate, dim)
  const void* B = nullptr;                // (batch, seqlen, dstate)
  const float* B_scale = nullptr;         // (dstate,), int8 B only
  const void* C = nullptr;                // (batch, seqlen, dstate)
  const float* C_scale = nullptr;         // (1,), int8 C only
  const float* D = nullptr;               // (dim,) or null
  const void* z = nullptr;                // (batch, seqlen, dim) or null
  const float* z_scale = nullptr;         // (dim,), int8 z only
  const float* gate_scale = nullptr;      // (dim,) or null, which means 1
  const void* addend = nullptr;           // (batch, seqlen, dim) or null
  const int32_t* order = nullptr;         // (seqlen,), a permutation of the tokens, or null
  const float* readout_scale = nullptr;   // (dim,) or null
  const float* initial_state = nullptr;   // (batch, dstate, dim) or null, which means 0
  void* y = nullptr;                      // (batch, seqlen, dim), contiguous
  float* final_state = nullptr;           // (batch, dstate, dim)
  float* workspace = nullptr;             // selective_scan_workspace_bytes(p)
  int64_t chunk_size = 0;                 // tokens that are scanned in sequence; > 0
  bool rotate_state = false;              // with readout_scale only; dstate a power of two
  bool reverse = false;                   // walk from the last step to the first
};

namespace cpu {
// The chunk_size that serves `p` on so many threads: the whole sequence where channels fill the
// threads.
int64_t selective_scan_chunk_size(const SelectiveScanParams& p, int64_t num_threads);
// 0 where one chunk holds the sequence.
int64_t selective_scan_workspace_bytes(const SelectiveScanParams& p);
Status selective_scan(const SelectiveScanParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
// The chunk_size that serves `p` on the current device: the whole sequence where channels fill it, else what
// a block can stage, up to 64 tokens. A larger one below seqlen counts as that; dstate other than 16 is
// always scanned in sequence.
int64_t selective_scan_chunk_size(const SelectiveScanParams& p);
// 0 where one block holds the sequence (in one chunk, or four).
int64_t selective_scan_workspace_bytes(const SelectiveScanParams& p);
Status selective_scan(const SelectiveScanParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
