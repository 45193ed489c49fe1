// What the convolutions take per channel: checks and params.
#pragma once

#include "mambaquant/conv_epilogue.h"
#include "torch/checks.h"

namespace mambaquant::binding {

struct ConvParameters {
  const Tensor& x_scale;
  const Tensor& weight;
  const Tensor& weight_scale;
  const OptionalTensor& bias;
  const Tensor& out_scale;
  const OptionalTensor& out_zero_point;
};

// int8, with `dims` dimensions of which the last is contiguous.
inline void check_conv_input(OpName op, const Tensor& x, int64_t dims) {
  check_dtype(op, x, at::kChar, "x");
  check_dim(op, x, dims, "x");
  check_last_dim_contiguous(op, x, "x");
}

// All but the weight.
inline void check_conv_epilogue(OpName op, const ConvParameters& c, const Tensor& x) {
  const int64_t dim = x.size(-1);
  check_parameter(op, c.x_scale, at::kFloat, {dim}, x, "x_scale", "(dim,)");
  check_parameter(op, c.weight_scale, at::kFloat, {dim}, x, "weight_scale", "(dim,)");
  check_parameter(op, c.bias, at::kFloat, {dim}, x, "bias", "(dim,)");
  check_parameter(op, c.out_scale, at::kFloat, {dim}, x, "out_scale", "(dim,)");
  check_parameter(op, c.out_zero_point, at::kInt, {dim}, x, "out_zero_point", "(dim,)");
}

inline void set_conv_epilogue(ConvEpilogueParams& p, const ConvParameters& c, const Tensor& x) {
  p.dim = x.size(-1);
  p.x_scale = c.x_scale.const_data_ptr<float>();
  p.weight_scale = c.weight_scale.const_data_ptr<float>();
  p.bias = data_or_null<float>(c.bias);
  p.out_scale = c.out_scale.const_data_ptr<float>();
  p.out_zero_point = data_or_null<int32_t>(c.out_zero_point);
}

}  // namespace mambaquant::binding
