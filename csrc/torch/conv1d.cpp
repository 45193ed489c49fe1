// causal_conv1d_quantize, causal_conv1d_update_quantize: checks, allocation, params.
#include "mambaquant/conv1d.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/backend.h"
#include "torch/conv_epilogue.h"

namespace mambaquant::binding {
namespace {

void check_channel_parameters(OpName op, const ConvParameters& c, const Tensor& x) {
  const int64_t dim = x.size(-1);
  check_dim(op, c.weight, 2, "weight");
  const int64_t width = c.weight.size(0);
  TORCH_CHECK_NOT_IMPLEMENTED(width >= 2 && width <= 4, op.name,
                              ": expected weight of width 2, 3 or 4, got ", width);
  check_parameter(op, c.weight, at::kChar, {width, dim}, x, "weight", "(width, dim)");
  check_conv_epilogue(op, c, x);
}

CausalConv1dQuantizeParams make_params(const Tensor& x, const ConvParameters& c, Tensor& q) {
  CausalConv1dQuantizeParams p;
  set_conv_epilogue(p, c, x);
  p.batch = x.size(0);
  p.seqlen = x.dim() == 3 ? x.size(1) : 1;
  p.width = c.weight.size(0);
  p.x_stride_batch = x.stride(0);
  p.x_stride_token = x.dim() == 3 ? x.stride(1) : 0;
  p.x = x.const_data_ptr<int8_t>();
  p.weight = c.weight.const_data_ptr<int8_t>();
  p.q = q.data_ptr<int8_t>();
  return p;
}

std::tuple<Tensor, Tensor> causal_conv1d_quantize(
    const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
    const OptionalTensor& bias, const Tensor& out_scale, const OptionalTensor& out_zero_point,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& order) {
  constexpr OpName op{"causal_conv1d_quantize"};
  check_conv_input(op, x, 3);
  const ConvParameters c{x_scale, weight, weight_scale, bias, out_scale, out_zero_point};
  check_channel_parameters(op, c, x);
  const int64_t state_shape[] = {x.size(0), weight.size(0) - 1, x.size(2)};
  check_parameter(op, initial_state, at::kChar, state_shape, x, "initial_state",
                  "(batch, width - 1, dim)");
  check_order(op, order, x.size(1), x);
  Tensor q = at::empty(x.sizes(), x.options());
  Tensor final_state = at::empty(state_shape, x.options());
  CausalConv1dQuantizeParams p = make_params(x, c, q);
  p.initial_state = data_or_null<int8_t>(initial_state);
  p.final_state = final_state.data_ptr<int8_t>();
  p.order = data_or_null<int32_t>(order);
  p.reverse = reverse;
  launch(
      op,
      buffers_of(x, x_scale, weight, weight_scale, bias, out_scale, out_zero_point, initial_state,
                 order, q, final_state),
      [&](const Threads& threads) { return cpu::causal_conv1d_quantize(p, threads); },
      [&](Stream stream) { return cuda::causal_conv1d_quantize(p, stream); });
  return {q, final_state};
}

Tensor causal_conv1d_update_quantize(const Tensor& x, const Tensor& conv_state,
                                     const Tensor& x_scale, const Tensor& weight,
                                     const Tensor& weight_scale, const OptionalTensor& bias,
                                     const Tensor& out_scale,
                                     const OptionalTensor& out_zero_point) {
  constexpr OpName op{"causal_conv1d_update_quantize"};
  check_conv_input(op, x, 2);
  const ConvParameters c{x_scale, weight, weight_scale, bias, out_scale, out_zero_point};
  check_channel_parameters(op, c, x);
  check_parameter(op, conv_state, at::kChar, {x.size(0), weight.size(0) - 1, x.size(1)}, x,
                  "conv_state", "(batch, width - 1, dim)");
  Tensor q = at::empty(x.sizes(), x.options());
  CausalConv1dQuantizeParams p = make_params(x, c, q);
  p.initial_state = conv_state.const_data_ptr<int8_t>();
  p.final_state = conv_state.data_ptr<int8_t>();
  launch(
      op,
      buffers_of(x, conv_state, x_scale, weight, weight_scale, bias, out_scale, out_zero_point, q),
      [&](const Threads& threads) { return cpu::causal_conv1d_quantize(p, threads); },
      [&](Stream stream) { return cuda::causal_conv1d_quantize(p, stream); });
  return q;
}

void register_ops(torch::Library& m) {
  m.impl("causal_conv1d_quantize", &causal_conv1d_quantize);
  m.impl("causal_conv1d_update_quantize", &causal_conv1d_update_quantize);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
