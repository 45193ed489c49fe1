// quantize, quantize_dynamic, dequantize: checks, allocation, params.
#include "mambaquant/quantize.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"

namespace mambaquant::binding {
namespace {

Granularity granularity_of(OpName op, std::optional<int64_t> axis) {
  if (!axis.has_value()) return Granularity::kPerTensor;
  TORCH_CHECK_VALUE(*axis == 0 || *axis == 1, op.name,
                    ": expected axis None (per tensor), 0 (per token) or 1 (per channel), got ",
                    *axis);
  return *axis == 0 ? Granularity::kPerToken : Granularity::kPerChannel;
}

int64_t scale_count(Granularity granularity, const Tensor& x) {
  if (granularity == Granularity::kPerTensor) return 1;
  return granularity == Granularity::kPerToken ? x.size(0) : x.size(1);
}

void check_matrix(OpName op, const Tensor& t, const char* name) {
  check_dim(op, t, 2, name);
  check_last_dim_contiguous(op, t, name);
}

void check_scale(OpName op, const Tensor& scale, const OptionalTensor& zero_point,
                 Granularity granularity, const Tensor& x) {
  const int64_t count = scale_count(granularity, x);
  check_parameter(op, scale, at::kFloat, {count}, x, "scale", "(1,), (tokens,) or (dim,) by axis");
  check_parameter(op, zero_point, at::kInt, {count}, x, "zero_point", "as scale");
}

QuantizeParams make_params(OpName op, const Tensor& x, Granularity granularity, Tensor& q) {
  QuantizeParams p;
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.x_stride_token = x.stride(0);
  p.x_dtype = float_dtype(op, x.scalar_type(), "x");
  p.granularity = granularity;
  p.x = x.const_data_ptr();
  p.q = q.data_ptr<int8_t>();
  return p;
}

Tensor quantize(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                std::optional<int64_t> axis) {
  constexpr OpName op{"quantize"};
  check_matrix(op, x, "x");
  const Granularity granularity = granularity_of(op, axis);
  check_scale(op, scale, zero_point, granularity, x);
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  QuantizeParams p = make_params(op, x, granularity, q);
  p.scale = scale.const_data_ptr<float>();
  p.zero_point = data_or_null<int32_t>(zero_point);
  launch(
      op, buffers_of(x, scale, zero_point, q),
      [&](const Threads& threads) { return cpu::quantize(p, threads); },
      [&](Stream stream) { return cuda::quantize(p, stream); });
  return q;
}

std::tuple<Tensor, Tensor> quantize_dynamic(const Tensor& x, std::optional<int64_t> axis) {
  constexpr OpName op{"quantize_dynamic"};
  check_matrix(op, x, "x");
  const Granularity granularity = granularity_of(op, axis);
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  Tensor scale = at::empty({scale_count(granularity, x)}, x.options().dtype(at::kFloat));
  QuantizeParams p = make_params(op, x, granularity, q);
  p.scale_out = scale.data_ptr<float>();
  launch(
      op, buffers_of(x, q, scale),
      [&](const Threads& threads) { return cpu::quantize(p, threads); },
      [&](Stream stream) { return cuda::quantize(p, stream); });
  return {q, scale};
}

Tensor dequantize(const Tensor& q, const Tensor& scale, const OptionalTensor& zero_point,
                  std::optional<int64_t> axis, at::ScalarType dtype) {
  constexpr OpName op{"dequantize"};
  check_dtype(op, q, at::kChar, "q");
  check_matrix(op, q, "q");
  const Granularity granularity = granularity_of(op, axis);
  check_scale(op, scale, zero_point, granularity, q);
  Tensor x = at::empty(q.sizes(), q.options().dtype(dtype));
  DequantizeParams p;
  p.tokens = q.size(0);
  p.dim = q.size(1);
  p.q_stride_token = q.stride(0);
  p.x_dtype = float_dtype(op, dtype, "dtype");
  p.granularity = granularity;
  p.q = q.const_data_ptr<int8_t>();
  p.scale = scale.const_data_ptr<float>();
  p.zero_point = data_or_null<int32_t>(zero_point);
  p.x = x.data_ptr();
  launch(
      op, buffers_of(q, scale, zero_point, x),
      [&](const Threads& threads) { return cpu::dequantize(p, threads); },
      [&](Stream stream) { return cuda::dequantize(p, stream); });
  return x;
}

void register_ops(torch::Library& m) {
  m.impl("quantize", &quantize);
  m.impl("quantize_dynamic", &quantize_dynamic);
  m.impl("dequantize", &dequantize);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
