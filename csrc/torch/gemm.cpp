// pack_gemm_weight, gemm, gemm_dequantize, gemm_requantize: checks, allocation, params.
#include "mambaquant/gemm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "torch/backend.h"
#include "torch/checks.h"

namespace mambaquant::binding {
namespace {

// A packing is read by the kernels that made it: the number of the instruction set on the CPU, one
// of its own on CUDA devices.
int64_t layout_of(const Tensor& x) {
  return by_backend(
      x, [] { return static_cast<int64_t>(cpu::current_isa()); }, [] { return kCudaGemmLayout; });
}

const char* layout_name(int64_t layout) {
  if (layout == kCudaGemmLayout) return "cuda";
  const bool is_isa = layout >= 0 && layout < cpu::kNumIsas;
  return is_isa ? cpu::isa_name(static_cast<cpu::Isa>(layout)) : "unknown";
}

void check_layout(OpName op, const Tensor& a, int64_t layout) {
  const int64_t used = layout_of(a);
  TORCH_CHECK_NOT_IMPLEMENTED(
      layout == used, op.name, ": expected layout ", used, " (", layout_name(used),
      ", which is in use), got ", layout, " (", layout_name(layout),
      "): pack the weight again with pack_gemm_weight under ", layout_name(used));
}

void check_matrix(OpName op, const Tensor& t, at::ScalarType type, const char* name) {
  check_dtype(op, t, type, name);
  check_dim(op, t, 2, name);
  check_last_dim_contiguous(op, t, name);
}

// The activations, the packed weight and room for repacked rows.
struct Operands {
  GemmOperands params;
  Tensor workspace;
};

Operands make_operands(OpName op, const Tensor& a, const Tensor& packed, int64_t layout,
                       int64_t n) {
  check_matrix(op, a, at::kChar, "a");
  check_device(op, packed, a, "packed");  // first: a layout belongs to a device
  check_layout(op, a, layout);
  TORCH_CHECK_VALUE(n >= 0, op.name, ": expected n of at least 0, got ", n);
  const int64_t bytes = packed_gemm_weight_bytes(n, a.size(1));
  check_dtype(op, packed, at::kChar, "packed");
  check_dim(op, packed, 1, "packed");
  TORCH_CHECK_VALUE(packed.numel() == bytes, op.name, ": expected packed of ", bytes,
                    " bytes, as pack_gemm_weight makes from a weight of shape (N, K) = (", n, ", ",
                    a.size(1), "), got ", packed.numel());
  check_contiguous(op, packed, "packed");
  Operands operands;
  GemmOperands& p = operands.params;
  p.m = a.size(0);
  p.n = n;
  p.k = a.size(1);
  p.a_stride_row = a.stride(0);
  p.a = a.const_data_ptr<int8_t>();
  p.packed = packed.const_data_ptr<int8_t>();
  const int64_t size = by_backend(
      a, [&] { return gemm_workspace_bytes(p.m, p.k, at::get_num_threads()); },
      [&] { return cuda::gemm_workspace_bytes(p); });
  if (size > 0) {
    operands.workspace = at::empty({size}, a.options());
    p.workspace = operands.workspace.data_ptr<int8_t>();
  }
  return operands;
}

int64_t column_count(OpName op, const Tensor& b_scale) {
  check_dim(op, b_scale, 1, "b_scale");
  return b_scale.size(0);
}

GemmScales make_scales(OpName op, const Tensor& a, int64_t n, const Tensor& a_scale,
                       const Tensor& b_scale, const OptionalTensor& acc_offset,
                       const OptionalTensor& bias) {
  const bool is_static = a_scale.dim() == 1 && a_scale.size(0) == 1;
  check_parameter(op, a_scale, at::kFloat, {is_static ? 1 : a.size(0)}, a, "a_scale",
                  "(1,) or (M,)");
  check_parameter(op, b_scale, at::kFloat, {n}, a, "b_scale", "(N,)");
  check_parameter(op, acc_offset, at::kInt, {n}, a, "acc_offset", "(N,)");
  check_parameter(op, bias, at::kFloat, {n}, a, "bias", "(N,)");
  GemmScales s;
  s.a_scale_is_per_token = !is_static;
  s.a_scale = a_scale.const_data_ptr<float>();
  s.b_scale = b_scale.const_data_ptr<float>();
  s.acc_offset = data_or_null<int32_t>(acc_offset);
  s.bias = data_or_null<float>(bias);
  return s;
}

std::tuple<Tensor, int64_t> pack_gemm_weight(const Tensor& weight) {
  constexpr OpName op{"pack_gemm_weight"};
  check_matrix(op, weight, at::kChar, "weight");
  // On the host: a weight is packed once, at load, and the answer is waited for anyway.
  TORCH_CHECK_VALUE(!at::eq(weight.cpu(), -kQMax - 1).any().item<bool>(), op.name,
                    ": expected weight in [-127, 127], got -128");
  PackGemmWeightParams p;
  p.n = weight.size(0);
  p.k = weight.size(1);
  p.weight_stride_row = weight.stride(0);
  p.weight = weight.const_data_ptr<int8_t>();
  Tensor packed = at::empty({packed_gemm_weight_bytes(p.n, p.k)}, weight.options());
  p.packed = packed.data_ptr<int8_t>();
  const int64_t layout = layout_of(weight);
  launch(
      op, buffers_of(weight, packed),
      [&](const Threads& threads) { return cpu::pack_gemm_weight(p, threads); },
      [&](Stream stream) { return cuda::pack_gemm_weight(p, stream); });
  return {packed, layout};
}

Tensor gemm(const Tensor& a, const Tensor& packed, int64_t layout, int64_t n) {
  constexpr OpName op{"gemm"};
  const Operands operands = make_operands(op, a, packed, layout, n);
  Tensor acc = at::empty({a.size(0), n}, a.options().dtype(at::kInt));
  GemmParams p;
  p.operands = operands.params;
  p.acc = acc.data_ptr<int32_t>();
  launch(
      op, buffers_of(a, packed, operands.workspace, acc),
      [&](const Threads& threads) { return cpu::gemm(p, threads); },
      [&](Stream stream) { return cuda::gemm(p, stream); });
  return acc;
}

Tensor gemm_dequantize(const Tensor& a, const Tensor& packed, int64_t layout, const Tensor& a_scale,
                       const Tensor& b_scale, const OptionalTensor& acc_offset,
                       const OptionalTensor& bias, const OptionalTensor& residual,
                       at::ScalarType dtype) {
  constexpr OpName op{"gemm_dequantize"};
  const int64_t n = column_count(op, b_scale);
  const Operands operands = make_operands(op, a, packed, layout, n);
  GemmDequantizeParams p;
  p.operands = operands.params;
  p.scales = make_scales(op, a, n, a_scale, b_scale, acc_offset, bias);
  p.out_dtype = float_dtype(op, dtype, "dtype");
  if (residual.has_value()) {
    p.residual_dtype = float_dtype(op, residual->scalar_type(), "residual");
    check_shape(op, *residual, {a.size(0), n}, "residual", "(M, N)");
    check_last_dim_contiguous(op, *residual, "residual");
    check_device(op, *residual, a, "residual");
    p.residual = residual->const_data_ptr();
    p.residual_stride_row = residual->stride(0);
  }
  Tensor out = at::empty({a.size(0), n}, a.options().dtype(dtype));
  p.out = out.data_ptr();
  launch(
      op,
      buffers_of(a, packed, operands.workspace, a_scale, b_scale, acc_offset, bias, residual, out),
      [&](const Threads& threads) { return cpu::gemm_dequantize(p, threads); },
      [&](Stream stream) { return cuda::gemm_dequantize(p, stream); });
  return out;
}

Tensor gemm_requantize(const Tensor& a, const Tensor& packed, int64_t layout, const Tensor& a_scale,
                       const Tensor& b_scale, const OptionalTensor& acc_offset,
                       const OptionalTensor& bias, const Tensor& out_scale,
                       const OptionalTensor& out_zero_point) {
  constexpr OpName op{"gemm_requantize"};
  const int64_t n = column_count(op, b_scale);
  const Operands operands = make_operands(op, a, packed, layout, n);
  check_parameter(op, out_scale, at::kFloat, {n}, a, "out_scale", "(N,)");
  check_parameter(op, out_zero_point, at::kInt, {n}, a, "out_zero_point", "(N,)");
  GemmRequantizeParams p;
  p.operands = operands.params;
  p.scales = make_scales(op, a, n, a_scale, b_scale, acc_offset, bias);
  p.out_scale = out_scale.const_data_ptr<float>();
  p.out_zero_point = data_or_null<int32_t>(out_zero_point);
  Tensor q = at::empty({a.size(0), n}, a.options().dtype(at::kChar));
  p.q = q.data_ptr<int8_t>();
  launch(
      op,
      buffers_of(a, packed, operands.workspace, a_scale, b_scale, acc_offset, bias, out_scale,
                 out_zero_point, q),
      [&](const Threads& threads) { return cpu::gemm_requantize(p, threads); },
      [&](Stream stream) { return cuda::gemm_requantize(p, stream); });
  return q;
}

void register_ops(torch::Library& m) {
  m.impl("pack_gemm_weight", &pack_gemm_weight);
  m.impl("gemm", &gemm);
  m.impl("gemm_dequantize", &gemm_dequantize);
  m.impl("gemm_requantize", &gemm_requantize);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
