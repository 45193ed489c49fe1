// selective_scan: what one channel does at one token, in one order of operations for the scan and the
// update, so that they agree bit for bit.
//
// Instructions per (token, channel, state) with the 16 states of a channel in one thread's registers:
//   recurrence  4   dt A', 2^x, (dt x) B, fma
//   read-out    1   float: fma
//               4   int8: fma rounds, min, max; 3/4 to pack four bytes, 1/4 dp4a
//               8   rotated: 4 more, the 64 additions of a 16-point transform
// What remains (softplus, dequantization, skip, gate) is done once per (token, channel).
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/quant.cuh"
#include "cuda/common/vec.cuh"
#include "mambaquant/selective_scan.h"

namespace mambaquant::cuda {

inline constexpr int32_t kStates = 16;  // where a thread holds all states of a channel

enum class Readout { kFloat, kInt8, kRotatedInt8 };

// NOTE(shifted-integers): a float in [2^23, 2^24) is an integer. 0x4b000000 | byte is 2^23 + byte, made by
// one byte permute; adding 1.5 * 2^23 rounds to nearest, ties to even, and leaves the integer in the low
// bits. Both avoid the conversion instructions, which share a slow pipe with 2^x.
inline constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
inline constexpr uint32_t kRounderBits = 0x4b400000u;
inline constexpr float kByteShift = 8388736.0f;     // 2^23 + 128: of an int8 whose sign bit was flipped
inline constexpr uint32_t kFlipSigns = 0x80808080u;  // of four

// int8 number `i` of four whose signs were flipped, plus kByteShift.
__device__ inline float shifted_byte(uint32_t four, int32_t i) {
  return __uint_as_float(__byte_perm(four, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i)));
}

// An element of a tensor whose type is known at run time.
__device__ inline float load_element(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(p)[i];
    case DType::kF16:
      return to_float(static_cast<const __half*>(p)[i]);
    case DType::kBF16:
      return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return to_float(static_cast<const int8_t*>(p)[i]);
  }
}
__device__ inline void store_element(void* p, DType dtype, int64_t i, float y) {
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(p)[i] = y;
      break;
    case DType::kF16:
      static_cast<__half*>(p)[i] = from_float<__half>(y);
      break;
    default:
      static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(y);
  }
}

// x_f = (x - zero) * scale. The difference is exact, with kByteShift on both sides too (zero points stay
// below 2^22).
struct InputScale {
  float zero, scale;
  __device__ float operator()(float x) const { return __fmul_rn(x - zero, scale); }
};
__device__ inline InputScale load_input_scale(const SelectiveScanParams& p, int64_t c) {
  return {p.x_zero_point == nullptr ? 0.0f : static_cast<float>(p.x_zero_point[c]), p.x_scale[c]};
}

__device__ inline float load_dt_bias(const SelectiveScanParams& p, int64_t c) {
  return p.dt_bias == nullptr ? 0.0f : p.dt_bias[c];
}

// From the sum over the states to y.
struct Output {
  float readout, D, z, gate;  // scales; gate in units of -log2(e)

  __device__ float skip(float sum, float x_f) const { return fmaf(D, x_f, __fmul_rn(sum, readout)); }
  __device__ float gated(float y, float z_q) const {
    const float z_f = z_q * z;
    return y * (z_f * rcp_approx(1.0f + exp2_approx(z_f * gate)));
  }
};
__device__ inline Output load_output(const SelectiveScanParams& p, int64_t c) {
  Output out;
  out.readout = p.readout_scale == nullptr ? 1.0f : __fmul_rn(p.readout_scale[c], *p.C_scale);
  out.D = p.D == nullptr ? 0.0f : p.D[c];
  out.z = p.z_scale == nullptr ? 1.0f : p.z_scale[c];
  out.gate = (p.gate_scale == nullptr ? 1.0f : p.gate_scale[c]) * -kLog2E;
  return out;
}

// The factor between a (rotated, not normalised) state and its integers.
__device__ inline float load_inv_readout_scale(const SelectiveScanParams& p, int64_t c) {
  if (p.readout_scale == nullptr) return 0.0f;
  const float inv_scale = inverse(p.readout_scale[c]);
  const float norm = __frcp_rn(__fsqrt_rn(static_cast<float>(p.dstate)));
  return p.rotate_state ? __fmul_rn(inv_scale, norm) : inv_scale;
}

// h = 2^(dt A) h + (dt x) B, A in units of log2(e).
__device__ inline float advance(float h, float A, float B, float dt, float dtx) {
  return fmaf(exp2_approx(dt * A), h, __fmul_rn(dtx, B));
}

// clamp(rne(h * inv_scale), -127, 127) in the low byte. NaN gives 127.
__device__ inline uint32_t quantized_state(float h, float inv_scale) {
  const float q = fmaf(h, inv_scale, kRounder);
  return __float_as_uint(fmaxf(fminf(q, kRounder + kQMax), kRounder + kQMinSymmetric));
}

// A row of B, or of C for the float read-out; a row of int8 C.
struct FloatRow {
  float data[kStates];
};
struct Int8Row {
  Vec<uint32_t, kStates / 4> words;
};
template <Readout kReadout>
struct ReadoutRow {
  using type = Int8Row;
};
template <>
struct ReadoutRow<Readout::kFloat> {
  using type = FloatRow;
};

__device__ inline void advance(float (&h)[kStates], const float (&A)[kStates], const FloatRow& B, float dt,
                               float dtx) {
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) h[n] = advance(h[n], A[n], B.data[n], dt, dtx);
}

// Sylvester's transform, not normalised.
__device__ inline void hadamard(float (&v)[kStates]) {
#pragma unroll
  for (int32_t half = kStates / 2; half > 0; half /= 2) {
#pragma unroll
    for (int32_t i = 0; i < kStates; ++i) {
      if ((i & half) != 0) continue;
      const float a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
}

// sum_n h[n] C[n] in four chains, which hide the latency of fma.
template <bool kRotate>
__device__ inline float read_out(const float (&h)[kStates], const FloatRow& C, float) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) sum[n % 4] = fmaf(h[n], C.data[n], sum[n % 4]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
// sum_n qh[n] C[n], exact: below 2^22, so that a sum that starts at kRounderBits ends as the bits of a float.
template <bool kRotate>
__device__ inline float read_out(const float (&h)[kStates], const Int8Row& C, float inv_scale) {
  float v[kStates];
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) v[n] = h[n];
  if constexpr (kRotate) hadamard(v);
  int32_t sum = static_cast<int32_t>(kRounderBits);
#pragma unroll
  for (int32_t n = 0; n < kStates; n += 4) {
    uint32_t q[4];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) q[i] = quantized_state(v[n + i], inv_scale);
    const uint32_t four = __byte_perm(__byte_perm(q[0], q[1], 0x0040u), __byte_perm(q[2], q[3], 0x0040u), 0x5410u);
    sum = __dp4a(static_cast<int32_t>(four), static_cast<int32_t>(C.words[n / 4]), sum);
  }
  return __int_as_float(sum) - kRounder;
}

}  // namespace mambaquant::cuda
