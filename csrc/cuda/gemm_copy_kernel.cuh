// Copies a matrix of int8 into rows of whole 16-byte vectors, zero padded: weights when they are
// packed, and activations whose rows cannot be read by 16 bytes where they lie.
//   packed[r][k] = matrix[r][k] where r < rows and k < columns, else 0
//
// Bound: bytes, each read once and written once. A thread writes kBytes: 16 where the source can be
// read by 16 too, else 4 that it gathers byte by byte (neighbouring lanes read neighbouring words, so
// that the four passes over a sector hit L1).
#pragma once

#include "cuda/common/vec.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kCopyThreads = 256;

struct CopyRowsParams {
  int64_t rows, columns;
  int64_t padded_rows, padded_columns;  // padded_columns is a multiple of 16
  int64_t stride_row;
  const int8_t* matrix;
  int8_t* packed;
};

template <int32_t kBytes>
__global__ void __launch_bounds__(kCopyThreads)
    gemm_copy_rows_kernel(const __grid_constant__ CopyRowsParams p) {
  const int64_t per_row = p.padded_columns / kBytes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (index >= p.padded_rows * per_row) return;
  const int64_t row = index / per_row, column = index % per_row * kBytes;
  const int8_t* from = p.matrix + row * p.stride_row + column;
  Vec<int8_t, kBytes> out{};
  if (row < p.rows) {
    if constexpr (kBytes == 16) {
      out = load_vec<kBytes>(from);
    } else {
#pragma unroll
      for (int32_t i = 0; i < kBytes; ++i) {
        if (column + i < p.columns) out[i] = from[i];
      }
    }
  }
  store_vec(p.packed + row * p.padded_columns + column, out);
}

}  // namespace mambaquant::cuda
