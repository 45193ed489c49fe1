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

#include "cuda/common/bytes.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/quant.cuh"
#include "cuda/common/vec.cuh"
#include "mambaquant/selective_scan.h"

namespace mambaquant::cuda {

inline constexpr int32_t kStates = 16;  // where a thread holds all states of a channel

enum class Readout { kFloat, kInt8, kRotatedInt8 };

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

__host__ __device__ inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kI8 ? 1 : dtype == DType::kF32 ? 4 : 2;
}

// Where a thread reads or writes an operand next, and how far apart rows are, in bytes.
struct Cursor {
  const char* row;
  int64_t stride;
  __device__ Cursor() {}
  __device__ Cursor(const void* base, DType dtype, int64_t offset, int64_t stride_token)
      : row(static_cast<const char*>(base) + offset * element_bytes(dtype)),
        stride(stride_token * element_bytes(dtype)) {}
  __device__ void skip(int32_t tokens) { row += tokens * stride; }
  __device__ const char* at(int64_t token) const { return row + token * stride; }
};

// Where in storage a step of the walk is, looked up; kNoToken for what is no token of the sequence, which is
// neither read nor written.
inline constexpr int64_t kNoToken = -1;
__device__ inline int64_t token_of(const SelectiveScanParams& p, int64_t step) {
  const int64_t t = p.reverse ? p.seqlen - 1 - step : step;
  if (p.order == nullptr) return t;
  const int64_t token = p.order[t];
  return token >= 0 && token < p.seqlen ? token : kNoToken;
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

// y = D x_f + the read-out, whose integers have a scale.
struct Skip {
  float D, readout;
  template <Readout kReadout>
  __device__ float apply(float sum, float x_f) const {
    return fmaf(D, x_f, kReadout == Readout::kFloat ? sum : __fmul_rn(sum, readout));
  }
};
__device__ inline Skip load_skip(const SelectiveScanParams& p, int64_t c) {
  return {p.D == nullptr ? 0.0f : p.D[c],
          p.readout_scale == nullptr ? 1.0f : __fmul_rn(p.readout_scale[c], *p.C_scale)};
}

// y *= z_f sigmoid(gate_scale z_f), z_f = z_scale z. The scale enters the denominator: z_scale / (1 + e) is
// 1 / (e / z_scale + 1 / z_scale), an fma in the place of an addition and a product.
struct Gate {
  float slope, inv_z_scale;  // slope: z_scale gate_scale, in units of -log2(e)
  __device__ float apply(float y, float z) const {
    const float e = exp2_approx(z * slope);
    return y * (z * rcp_approx(fmaf(e, inv_z_scale, inv_z_scale)));
  }
};
__device__ inline Gate load_gate(const SelectiveScanParams& p, int64_t c) {
  const float z_scale = p.z_scale == nullptr ? 1.0f : p.z_scale[c];
  const float gate_scale = (p.gate_scale == nullptr ? 1.0f : p.gate_scale[c]) * -kLog2E;
  return {__fmul_rn(z_scale, gate_scale), inverse(z_scale)};
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

// kRounder + clamp(rne(h * inv_scale), -127, 127). NaN gives 127.
__device__ inline float quantized_state(float h, float inv_scale) {
  const float q = fmaf(h, inv_scale, kRounder);
  return fmaxf(fminf(q, kRounder + kQMax), kRounder + kQMinSymmetric);
}

// In the place of a dt that does not exist: softplus makes it 0, a step that leaves the state as it is.
inline constexpr float kNoStep = -__builtin_huge_valf();

// A token's row of B, or of C for the float read-out; of int8 C. Built-in vectors, which the compiler never
// takes apart into loads of four bytes.
struct FloatRow {
  float4 four[kStates / 4];
};
struct Int8Row {
  uint4 words;
};
template <Readout kReadout>
struct ReadoutRow {
  using type = Int8Row;
};
template <>
struct ReadoutRow<Readout::kFloat> {
  using type = FloatRow;
};

__device__ inline void advance(float (&h)[kStates], const float (&A)[kStates], const FloatRow& B,
                               float dt, float dtx) {
#pragma unroll
  for (int32_t n = 0; n < kStates; n += 4) {
    const float4 b = B.four[n / 4];
    h[n] = advance(h[n], A[n], b.x, dt, dtx);
    h[n + 1] = advance(h[n + 1], A[n + 1], b.y, dt, dtx);
    h[n + 2] = advance(h[n + 2], A[n + 2], b.z, dt, dtx);
    h[n + 3] = advance(h[n + 3], A[n + 3], b.w, dt, dtx);
  }
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

// (dstate, dim) rows, one channel.
__device__ inline void load_state(const float* rows, int64_t stride, float (&h)[kStates]) {
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n, rows += stride) h[n] = __ldcg(rows);
}
__device__ inline void store_state(float* rows, int64_t stride, const float (&h)[kStates]) {
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n, rows += stride) *rows = h[n];
}
__device__ inline void load_initial_state(const SelectiveScanParams& p, int64_t offset,
                                          int64_t stride, float (&h)[kStates]) {
  if (p.initial_state != nullptr) return load_state(p.initial_state + offset, stride, h);
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) h[n] = 0.0f;
}

// sum_n h[n] C[n] in four chains, which hide the latency of fma.
template <Readout kReadout>
__device__ inline float read_out(const float (&h)[kStates], const FloatRow& C, float) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int32_t n = 0; n < kStates; n += 4) {
    const float4 c = C.four[n / 4];
    sum.x = fmaf(h[n], c.x, sum.x);
    sum.y = fmaf(h[n + 1], c.y, sum.y);
    sum.z = fmaf(h[n + 2], c.z, sum.z);
    sum.w = fmaf(h[n + 3], c.w, sum.w);
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}
__device__ inline int32_t add_int8_readout(const float* v, uint32_t C, float inv_scale,
                                           int32_t sum) {
  const uint32_t q =
      packed_low_bytes(quantized_state(v[0], inv_scale), quantized_state(v[1], inv_scale),
                       quantized_state(v[2], inv_scale), quantized_state(v[3], inv_scale));
  return __dp4a(static_cast<int32_t>(q), static_cast<int32_t>(C), sum);
}
// sum_n qh[n] C[n], exact: below 2^22, so that a sum that starts at kRounderBits ends as the bits of a float.
template <Readout kReadout>
__device__ inline float read_out(const float (&h)[kStates], const Int8Row& C, float inv_scale) {
  float v[kStates];
#pragma unroll
  for (int32_t n = 0; n < kStates; ++n) v[n] = h[n];
  if constexpr (kReadout == Readout::kRotatedInt8) hadamard(v);
  const uint4 c = C.words;
  int32_t sum = static_cast<int32_t>(kRounderBits);
  sum = add_int8_readout(v, c.x, inv_scale, sum);
  sum = add_int8_readout(v + 4, c.y, inv_scale, sum);
  sum = add_int8_readout(v + 8, c.z, inv_scale, sum);
  sum = add_int8_readout(v + 12, c.w, inv_scale, sum);
  return unshifted(sum);
}

}  // namespace mambaquant::cuda
