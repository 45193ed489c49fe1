// gemm: int8 matrix product with fused scaling. a (M, K) int8 row-major, weight (N, K) int8 packed
// once.
//   acc[m,n]   = sum_k a[m,k] * weight[n,k]                                        int32, exact
//   value[m,n] = float(acc[m,n] - acc_offset[n]) * (a_scale[m] * b_scale[n]) [+ bias[n]] [+
//   residual[m,n]] gemm: acc;  gemm_dequantize: value;  gemm_requantize: clamp(rne(value /
//   out_scale[n]) + out_zero_point[n])
// value is float32 in the order written, every operation rounded on its own (no fma), so that a
// float32 emulation gives equal bits.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

// The packed weight has the size of (N, K) padded to these multiples, on every ISA and device; what
// stands where is the kernels' own affair (cpu/gemm_micro.h, cuda/gemm.cu). The layout id is the
// ISA's number, or kCudaGemmLayout.
inline constexpr int64_t kGemmColumnMultiple = 32;
inline constexpr int64_t kGemmDepthMultiple = 16;
inline constexpr int64_t kCudaGemmLayout = 16;

// With an acc_offset the difference acc - acc_offset must fit int32 too: 255 * 127 *
// kMaxKWithOffset < 2^31.
inline constexpr int64_t kMaxKWithOffset = kMaxK / 2;

// What the CPU kernels pad K to within the packed weight and in copied activations.
inline constexpr int64_t kGemmCpuDepthMultiple = 4;

// Activations that a thread reads again and again, panel after panel (a quarter of a 1 MB L2), and
// what it takes from the stack without asking for a workspace.
inline constexpr int64_t kGemmBlockBytes = 256 * 1024;
inline constexpr int64_t kGemmStackBytes = 16384;

struct PackGemmWeightParams {
  int64_t n = 0, k = 0;
  int64_t weight_stride_row = 0;   // elements; the last dim is contiguous
  const int8_t* weight = nullptr;  // (N, K), in [-127, 127]
  int8_t* packed = nullptr;        // (packed_gemm_weight_bytes(n, k),)
};

struct GemmOperands {
  int64_t m = 0, n = 0, k = 0;
  int64_t a_stride_row = 0;        // elements; the last dim is contiguous
  const int8_t* a = nullptr;       // (M, K), in [-128, 127]
  const int8_t* packed = nullptr;  // from pack_gemm_weight on the same ISA
  int8_t* workspace = nullptr;     // (gemm_workspace_bytes(m, k, num_threads),)
};

struct GemmScales {
  bool a_scale_is_per_token = false;
  const float* a_scale = nullptr;       // (1,) or (M,)
  const float* b_scale = nullptr;       // (N,)
  const int32_t* acc_offset = nullptr;  // (N,); null: 0
  const float* bias = nullptr;          // (N,); null: none
};

struct GemmParams {
  GemmOperands operands;
  int32_t* acc = nullptr;  // (M, N), contiguous
};

struct GemmDequantizeParams {
  GemmOperands operands;
  GemmScales scales;
  int64_t residual_stride_row = 0;  // elements
  DType residual_dtype = DType::kF32;
  DType out_dtype = DType::kF32;
  const void* residual = nullptr;  // (M, N); null: none
  void* out = nullptr;             // (M, N), contiguous
};

struct GemmRequantizeParams {
  GemmOperands operands;
  GemmScales scales;
  const float* out_scale = nullptr;         // (N,)
  const int32_t* out_zero_point = nullptr;  // (N,); null: symmetric
  int8_t* q = nullptr;                      // (M, N), contiguous
};

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

constexpr int64_t packed_gemm_weight_bytes(int64_t n, int64_t k) {
  return round_up(n, kGemmColumnMultiple) * round_up(k, kGemmDepthMultiple);
}

// A thread may have to copy a block of rows at a time: kGemmBlockBytes of them, give or take two tiles,
// as int16 at most. 0 where that fits the stack.
constexpr int64_t gemm_scratch_bytes(int64_t m, int64_t k) {
  const int64_t row_bytes = round_up(k, kGemmCpuDepthMultiple) * 2;
  const int64_t limit = kGemmBlockBytes * 2 / (row_bytes + 1) + 24;
  return round_up((m < limit ? m : limit) * row_bytes, 64);
}
constexpr int64_t gemm_workspace_bytes(int64_t m, int64_t k, int64_t num_threads) {
  const int64_t scratch = gemm_scratch_bytes(m, k);
  return scratch <= kGemmStackBytes ? 0 : scratch * num_threads;
}

namespace cpu {
Status pack_gemm_weight(const PackGemmWeightParams& p, const Threads& threads);
Status gemm(const GemmParams& p, const Threads& threads);
Status gemm_dequantize(const GemmDequantizeParams& p, const Threads& threads);
Status gemm_requantize(const GemmRequantizeParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
// Room for rows that the kernels cannot read where they lie and for sums that several blocks share.
int64_t gemm_workspace_bytes(const GemmOperands& p);
Status pack_gemm_weight(const PackGemmWeightParams& p, Stream stream);
Status gemm(const GemmParams& p, Stream stream);
Status gemm_dequantize(const GemmDequantizeParams& p, Stream stream);
Status gemm_requantize(const GemmRequantizeParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
