// rmsnorm_quantize, layernorm_quantize: checks, allocation, params.
#include "mambaquant/norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"

namespace mambaquant::binding {
namespace {

using QuantizedNorm = std::tuple<Tensor, Tensor, Tensor>;

struct NormArguments {
  const Tensor& x;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  const OptionalTensor& scale;
  double eps;
  bool subtract_mean;
};

void check_arguments(OpName op, const NormArguments& a) {
  check_dim(op, a.x, 2, "x");
  check_last_dim_contiguous(op, a.x, "x");
  const int64_t dim = a.x.size(1);
  check_parameter(op, a.weight, at::kFloat, {dim}, a.x, "weight", "(dim,)");
  check_parameter(op, a.bias, at::kFloat, {dim}, a.x, "bias", "(dim,)");
  check_parameter(op, a.scale, at::kFloat, {1}, a.x, "scale", "(1,)");
  if (a.residual.has_value()) {
    check_shape(op, *a.residual, a.x.sizes(), "residual", "as x");
    check_device(op, *a.residual, a.x, "residual");
    check_last_dim_contiguous(op, *a.residual, "residual");
  }
  TORCH_CHECK_VALUE(a.eps >= 0.0, op.name, ": expected eps >= 0, got ", a.eps);
}

QuantizedNorm norm_quantize(OpName op, const NormArguments& a) {
  NormQuantizeParams p;
  p.x_dtype = float_dtype(op, a.x.scalar_type(), "x");
  if (a.residual.has_value())
    p.residual_dtype = float_dtype(op, a.residual->scalar_type(), "residual");
  check_arguments(op, a);
  const int64_t tokens = a.x.size(0);
  Tensor q = at::empty(a.x.sizes(), a.x.options().dtype(at::kChar));
  Tensor scale = at::empty({a.scale.has_value() ? 0 : tokens}, a.x.options().dtype(at::kFloat));
  Tensor residual = a.residual.has_value() ? at::empty(a.x.sizes(), a.residual->options())
                                           : at::empty({0}, a.x.options());
  p.tokens = tokens;
  p.dim = a.x.size(1);
  p.x_stride_token = a.x.stride(0);
  p.subtract_mean = a.subtract_mean;
  p.eps = static_cast<float>(a.eps);
  p.x = a.x.const_data_ptr();
  p.weight = data_or_null<float>(a.weight);
  p.bias = data_or_null<float>(a.bias);
  p.scale = data_or_null<float>(a.scale);
  p.q = q.data_ptr<int8_t>();
  p.scale_out = scale.data_ptr<float>();
  if (a.residual.has_value()) {
    p.residual_stride_token = a.residual->stride(0);
    p.residual = a.residual->const_data_ptr();
    p.residual_out = residual.data_ptr();
  }
  launch(
      op, buffers_of(a.x, a.weight, a.bias, a.residual, a.scale, q, scale, residual),
      [&](const Threads& threads) { return cpu::norm_quantize(p, threads); },
      [&](Stream stream) { return cuda::norm_quantize(p, stream); });
  return {q, scale, residual};
}

QuantizedNorm rmsnorm_quantize(const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& residual, const OptionalTensor& scale,
                               double eps) {
  const OptionalTensor no_bias;
  return norm_quantize(OpName{"rmsnorm_quantize"},
                       {x, weight, no_bias, residual, scale, eps, false});
}

QuantizedNorm layernorm_quantize(const Tensor& x, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& residual,
                                 const OptionalTensor& scale, double eps) {
  return norm_quantize(OpName{"layernorm_quantize"}, {x, weight, bias, residual, scale, eps, true});
}

void register_ops(torch::Library& m) {
  m.impl("rmsnorm_quantize", &rmsnorm_quantize);
  m.impl("layernorm_quantize", &layernorm_quantize);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
