// selective_scan_update with 16 states: one token of each sequence.
//
// A thread takes one channel of several sequences, A and the scales in registers; neighbouring threads
// neighbouring channels, so that every request is whole sectors. Bound: bytes, 138 a channel and sequence
// (the state in and out 128) and 92 a channel; all loads of a thread are independent.
#pragma once

#include "cuda/selective_scan_channel.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kUpdateThreads = 64;
inline constexpr int32_t kUpdateBlocksPerSm = 8;  // at 128 registers a thread

template <Readout kReadout>
struct UpdateRows {
  FloatRow B;
  typename ReadoutRow<kReadout>::type C;
};

// The thread's element of one sequence's B (the first 16 threads) or C (the next 16).
template <Readout kReadout>
__device__ inline float load_row_element(const SelectiveScanParams& p, int64_t batch) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x), n = thread % kStates;
  if (thread < kStates) {
    const float B = load_element(p.B, p.B_dtype, batch * p.B_stride_batch + n);
    return __fmul_rn(B, p.B_scale == nullptr ? 1.0f : p.B_scale[n]);
  }
  if (thread >= 2 * kStates) return 0.0f;
  const float C = load_element(p.C, p.C_dtype, batch * p.C_stride_batch + n);
  if (kReadout != Readout::kFloat) return C;
  return __fmul_rn(C, p.C_scale == nullptr ? 1.0f : *p.C_scale);
}
template <Readout kReadout>
__device__ inline void store_row_element(float element, UpdateRows<kReadout>* rows) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x), n = thread % kStates;
  if (thread < kStates) {
    reinterpret_cast<float*>(&rows->B)[n] = element;
  } else if (thread < 2 * kStates) {
    if constexpr (kReadout == Readout::kFloat) {
      reinterpret_cast<float*>(&rows->C)[n] = element;
    } else {
      reinterpret_cast<int8_t*>(&rows->C)[n] = static_cast<int8_t>(element);
    }
  }
}

template <Readout kReadout>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocksPerSm)
    update_kernel(const __grid_constant__ SelectiveScanParams p, int32_t sequences_per_block) {
  __shared__ UpdateRows<kReadout> rows;
  const int64_t tiles = (p.dim + kUpdateThreads - 1) / kUpdateThreads;
  const int64_t c = blockIdx.x % tiles * kUpdateThreads + threadIdx.x;
  const bool exists = c < p.dim;
  const int64_t column = exists ? c : 0;
  const InputScale input = load_input_scale(p, column);
  const float bias = load_dt_bias(p, column), inv_readout_scale = load_inv_readout_scale(p, column);
  const Skip skip = load_skip(p, column);
  const Gate gate = load_gate(p, column);
  float A[kStates];
  load_state(p.A + column, p.dim, A);
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) A[n] *= kLog2E;

  const int64_t first = blockIdx.x / tiles * sequences_per_block;
  const int64_t end = min(first + sequences_per_block, p.batch);
#pragma unroll 1
  for (int64_t batch = first; batch < end; ++batch) {
    const int64_t state = batch * kStates * p.dim + column;
    const int64_t row = opaque(p.dim);
    // Before the barrier, so that all loads of a sequence are in flight together.
    const float element = load_row_element<kReadout>(p, batch);
    float h[kStates];
    load_initial_state(p, state, row, h);
    const float dt =
        softplus(load_element(p.dt, p.dt_dtype, batch * p.dt_stride_batch + column) + bias);
    const float x_f = input(to_float(p.x[batch * p.x_stride_batch + column]));
    const float z =
        p.z == nullptr ? 0.0f : load_element(p.z, p.z_dtype, batch * p.z_stride_batch + column);
    __syncthreads();
    store_row_element(element, &rows);
    __syncthreads();
    advance(h, A, rows.B, dt, __fmul_rn(dt, x_f));
    float y = skip.apply<kReadout>(read_out<kReadout>(h, rows.C, inv_readout_scale), x_f);
    if (p.z != nullptr) y = gate.apply(y, z);
    if (!exists) continue;
    store_element(p.y, p.y_dtype, batch * p.dim + c, y);
    store_state(p.final_state + state, row, h);
  }
}

}  // namespace mambaquant::cuda
