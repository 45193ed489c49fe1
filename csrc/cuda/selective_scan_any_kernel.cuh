// selective_scan for any dstate from 1 to 256, in sequence; serves the update too.
//
// `lanes` neighbouring lanes (a power of two, up to 32) share one channel: lane l holds the states l,
// l + lanes, ..., kPerLane of them; states that do not exist stay 0. Sums over the states are butterflies
// over the lanes, so is the part of the rotation that crosses them. Bound: instructions; what is done once
// per (token, channel) is done by each lane of a channel here, and loads are of single elements.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/selective_scan_channel.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kAnyThreads = 128;

// What one token brings to a lane.
template <int32_t kPerLane>
struct LaneToken {
  int64_t token;  // in storage, or kNoToken
  float x, dt, z, addend;
  float B[kPerLane], C[kPerLane];
};

// A lane's place, its states, and where it reads.
template <int32_t kPerLane>
struct LaneChannel {
  int64_t batch, c;
  int32_t lane, lanes;
  bool exists;
  float A[kPerLane], h[kPerLane], B_scale[kPerLane];
  float C_scale;
  Cursor x, dt, z, addend, B, C;  // at token 0

  __device__ int32_t state(int32_t k) const { return lane + k * lanes; }
};

template <int32_t kPerLane>
__device__ inline LaneToken<kPerLane> load_token(const SelectiveScanParams& p, int64_t step,
                                                 const LaneChannel<kPerLane>& channel) {
  LaneToken<kPerLane> token;
  const int64_t at = token_of(p, step);
  const bool exists = at != kNoToken;
  const auto load = [&](const Cursor& cursor, DType dtype, int32_t i) {
    return load_element(cursor.at(at), dtype, i);
  };
  token.token = at;
  token.x = exists ? load(channel.x, DType::kI8, 0) : 0.0f;
  token.dt = exists ? load(channel.dt, p.dt_dtype, 0) : kNoStep;
  token.z = exists && p.z != nullptr ? load(channel.z, p.z_dtype, 0) : 0.0f;
  token.addend = exists && p.addend != nullptr ? load(channel.addend, p.addend_dtype, 0) : 0.0f;
#pragma unroll
  for (int32_t k = 0; k < kPerLane; ++k) {
    token.B[k] = token.C[k] = 0.0f;
    if (!exists || channel.state(k) >= p.dstate) continue;
    token.B[k] = __fmul_rn(load(channel.B, p.B_dtype, k * channel.lanes), channel.B_scale[k]);
    token.C[k] = __fmul_rn(load(channel.C, p.C_dtype, k * channel.lanes), channel.C_scale);
  }
  return token;
}

// Sylvester's transform over the states of all lanes, not normalised.
template <int32_t kPerLane>
__device__ inline void hadamard_lanes(const LaneChannel<kPerLane>& channel, float (&v)[kPerLane]) {
#pragma unroll
  for (int32_t half = kPerLane / 2; half > 0; half /= 2) {
#pragma unroll
    for (int32_t k = 0; k < kPerLane; ++k) {
      if ((k & half) != 0) continue;
      const float a = v[k], b = v[k + half];
      v[k] = a + b;
      v[k + half] = a - b;
    }
  }
#pragma unroll
  for (int32_t half = kWarpSize / 2; half > 0; half /= 2) {
    if (half >= channel.lanes) continue;
    const float sign = (channel.lane & half) == 0 ? 1.0f : -1.0f;
#pragma unroll
    for (int32_t k = 0; k < kPerLane; ++k)
      v[k] = fmaf(sign, v[k], __shfl_xor_sync(kFullMask, v[k], half));
  }
}

// The sum over the states, the same in all lanes of a channel.
template <int32_t kPerLane>
__device__ inline float read_out_lanes(const SelectiveScanParams& p,
                                       const LaneChannel<kPerLane>& channel,
                                       const LaneToken<kPerLane>& token, float inv_readout_scale) {
  float v[kPerLane];
#pragma unroll
  for (int32_t k = 0; k < kPerLane; ++k) v[k] = channel.h[k];
  if (p.rotate_state) hadamard_lanes(channel, v);
  float sum = 0.0f;
#pragma unroll
  for (int32_t k = 0; k < kPerLane; ++k) {
    // Sums of integers stay below 2^24: exact.
    if (p.readout_scale != nullptr) v[k] = quantized_state(v[k], inv_readout_scale) - kRounder;
    sum = fmaf(v[k], token.C[k], sum);
  }
#pragma unroll
  for (int32_t offset = kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset < channel.lanes) sum += __shfl_xor_sync(kFullMask, sum, offset);
  }
  return sum;
}

template <int32_t kPerLane>
__device__ inline LaneChannel<kPerLane> load_lane_channel(const SelectiveScanParams& p,
                                                          int32_t lanes) {
  LaneChannel<kPerLane> channel;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kAnyThreads + threadIdx.x;
  channel.lanes = lanes;
  channel.lane = static_cast<int32_t>(threadIdx.x) % lanes;
  channel.exists = thread / lanes < p.batch * p.dim;
  const int64_t row =
      channel.exists ? thread / lanes : 0;  // the others keep step and store nothing
  channel.batch = row / p.dim;
  channel.c = row % p.dim;
  const int64_t b = channel.batch, c = channel.c;
  channel.x = Cursor(p.x, DType::kI8, b * p.x_stride_batch + c, p.x_stride_token);
  channel.dt = Cursor(p.dt, p.dt_dtype, b * p.dt_stride_batch + c, p.dt_stride_token);
  channel.z = Cursor(p.z, p.z_dtype, b * p.z_stride_batch + c, p.z_stride_token);
  channel.addend =
      Cursor(p.addend, p.addend_dtype, b * p.addend_stride_batch + c, p.addend_stride_token);
  channel.B = Cursor(p.B, p.B_dtype, b * p.B_stride_batch + channel.lane, p.B_stride_token);
  channel.C = Cursor(p.C, p.C_dtype, b * p.C_stride_batch + channel.lane, p.C_stride_token);
  channel.C_scale = p.C_scale == nullptr || p.readout_scale != nullptr ? 1.0f : *p.C_scale;
#pragma unroll
  for (int32_t k = 0; k < kPerLane; ++k) {
    const int64_t n = channel.state(k);
    const bool exists = n < p.dstate;
    channel.A[k] = exists ? p.A[n * p.dim + c] * kLog2E : 0.0f;
    channel.B_scale[k] = exists && p.B_scale != nullptr ? p.B_scale[n] : 1.0f;
    channel.h[k] = exists && p.initial_state != nullptr
                       ? p.initial_state[(b * p.dstate + n) * p.dim + c]
                       : 0.0f;
  }
  return channel;
}

template <int32_t kPerLane>
__global__ void __launch_bounds__(kAnyThreads, kPerLane < 8 ? 4 : 2)
    scan_any_kernel(const __grid_constant__ SelectiveScanParams p, int32_t lanes) {
  LaneChannel<kPerLane> channel = load_lane_channel<kPerLane>(p, lanes);
  const InputScale input = load_input_scale(p, channel.c);
  const float bias = load_dt_bias(p, channel.c),
              inv_readout_scale = load_inv_readout_scale(p, channel.c);
  const Skip skip = load_skip(p, channel.c);
  const Gate gate = load_gate(p, channel.c);
  LaneToken<kPerLane> next = load_token(p, 0, channel);
  for (int64_t t = 0; t < p.seqlen; ++t) {
    const LaneToken<kPerLane> token = next;
    if (t + 1 < p.seqlen) next = load_token(p, t + 1, channel);
    const float dt = softplus(token.dt + bias), x_f = input(token.x);
    const float dtx = __fmul_rn(dt, x_f);
#pragma unroll
    for (int32_t k = 0; k < kPerLane; ++k)
      channel.h[k] = advance(channel.h[k], channel.A[k], token.B[k], dt, dtx);
    // Without integers the scale is 1: one form serves both.
    float y = skip.apply<Readout::kInt8>(read_out_lanes(p, channel, token, inv_readout_scale), x_f);
    if (p.addend != nullptr) y += token.addend;
    if (p.z != nullptr) y = gate.apply(y, token.z);
    if (channel.exists && channel.lane == 0 && token.token != kNoToken) {
      const int64_t row = channel.batch * p.seqlen + token.token;
      store_element(p.y, p.y_dtype, row * p.dim + channel.c, y);
    }
  }
  if (!channel.exists) return;
#pragma unroll
  for (int32_t k = 0; k < kPerLane; ++k) {
    const int64_t n = channel.state(k);
    if (n < p.dstate)
      p.final_state[(channel.batch * p.dstate + n) * p.dim + channel.c] = channel.h[k];
  }
}

}  // namespace mambaquant::cuda
