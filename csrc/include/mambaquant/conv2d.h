// depthwise_conv2d_quantize: depthwise convolution of an image over int8, bias, SiLU, and back to int8.
//   acc[i,j,c] = sum_(m,n) weight[m,n,c] * x[i * stride + m - kernel_height / 2, j * stride + n - kernel_width / 2, c]
//   q[i,j,c] = epilogue(acc[i,j,c]), of conv_epilogue.h
// acc is an exact integer, |acc| <= 49 * 128 * 128 < 2^20. Outside the image x is 0 (it is symmetric, so that this is
// the value 0).
#pragma once

#include "mambaquant/conv_epilogue.h"

namespace mambaquant {

inline constexpr int64_t kMaxConv2dKernel = 7;

struct DepthwiseConv2dQuantizeParams : ConvEpilogueParams {
  int64_t batch = 0, height = 0, width = 0;
  int64_t kernel_height = 0, kernel_width = 0;                        // odd, 1 to 7
  int64_t stride = 1;                                                 // 1 or 2, in both directions
  int64_t x_stride_batch = 0, x_stride_row = 0, x_stride_column = 0;  // elements
  const int8_t* x = nullptr;       // (batch, height, width, dim), the last dim contiguous
  const int8_t* weight = nullptr;  // (kernel_height, kernel_width, dim), contiguous
  int8_t* q = nullptr;             // (batch, out_height, out_width, dim), contiguous

  static constexpr int64_t out_size(int64_t size, int64_t stride) {
    return (size + stride - 1) / stride;
  }
  constexpr int64_t out_height() const { return out_size(height, stride); }
  constexpr int64_t out_width() const { return out_size(width, stride); }
};

inline constexpr bool is_conv2d_kernel_size(int64_t size) {
  return size >= 1 && size <= kMaxConv2dKernel && size % 2 == 1;
}

namespace cpu {
Status depthwise_conv2d_quantize(const DepthwiseConv2dQuantizeParams& p, const Threads& threads);
}  // namespace cpu

namespace cuda {
Status depthwise_conv2d_quantize(const DepthwiseConv2dQuantizeParams& p, Stream stream);
}  // namespace cuda

}  // namespace mambaquant
