// depthwise_conv2d_quantize: checks, allocation, params.
#include "mambaquant/conv2d.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "torch/backend.h"
#include "torch/conv_epilogue.h"

namespace mambaquant::binding {
namespace {

void check_kernel(OpName op, const Tensor& weight, const Tensor& x, int64_t stride) {
  check_dim(op, weight, 3, "weight");
  const int64_t height = weight.size(0), width = weight.size(1);
  TORCH_CHECK_NOT_IMPLEMENTED(is_conv2d_kernel_size(height) && is_conv2d_kernel_size(width),
                              op.name, ": expected weight of odd height and width from 1 to ",
                              kMaxConv2dKernel, ", got ", height, " x ", width);
  check_parameter(op, weight, at::kChar, {height, width, x.size(3)}, x, "weight",
                  "(kernel_height, kernel_width, dim)");
  TORCH_CHECK_NOT_IMPLEMENTED(stride == 1 || stride == 2, op.name, ": expected stride 1 or 2, got ",
                              stride);
}

Tensor depthwise_conv2d_quantize(const Tensor& x, const Tensor& x_scale, const Tensor& weight,
                                 const Tensor& weight_scale, const OptionalTensor& bias,
                                 const Tensor& out_scale, const OptionalTensor& out_zero_point,
                                 int64_t stride) {
  constexpr OpName op{"depthwise_conv2d_quantize"};
  check_conv_input(op, x, 4);
  check_kernel(op, weight, x, stride);
  const ConvParameters c{x_scale, weight, weight_scale, bias, out_scale, out_zero_point};
  check_conv_epilogue(op, c, x);
  DepthwiseConv2dQuantizeParams p;
  set_conv_epilogue(p, c, x);
  p.batch = x.size(0);
  p.height = x.size(1);
  p.width = x.size(2);
  p.kernel_height = weight.size(0);
  p.kernel_width = weight.size(1);
  p.stride = stride;
  p.x_stride_batch = x.stride(0);
  p.x_stride_row = x.stride(1);
  p.x_stride_column = x.stride(2);
  p.x = x.const_data_ptr<int8_t>();
  p.weight = weight.const_data_ptr<int8_t>();
  Tensor q = at::empty({p.batch, p.out_height(), p.out_width(), p.dim}, x.options());
  p.q = q.data_ptr<int8_t>();
  launch(
      op, buffers_of(x, x_scale, weight, weight_scale, bias, out_scale, out_zero_point, q),
      [&](const Threads& threads) { return cpu::depthwise_conv2d_quantize(p, threads); },
      [&](Stream stream) { return cuda::depthwise_conv2d_quantize(p, stream); });
  return q;
}

void register_ops(torch::Library& m) {
  m.impl("depthwise_conv2d_quantize", &depthwise_conv2d_quantize);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
