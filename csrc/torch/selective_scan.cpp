// selective_scan, selective_scan_update: checks, allocation, params.
#include "mambaquant/selective_scan.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"

namespace mambaquant::binding {
namespace {

// The arguments that both operators share.
struct ScanInputs {
  const Tensor& x;
  const Tensor& x_scale;
  const OptionalTensor& x_zero_point;
  const Tensor& dt;
  const OptionalTensor& dt_bias;
  const Tensor& A;
  const Tensor& B;
  const OptionalTensor& B_scale;
  const Tensor& C;
  const OptionalTensor& C_scale;
  const OptionalTensor& D;
  const OptionalTensor& z;
  const OptionalTensor& z_scale;
  const OptionalTensor& gate_scale;
  const OptionalTensor& readout_scale;
  bool rotate_state;
};

// A (batch, seqlen, .) or (batch, .) operand beside x.
void check_operand(OpName op, const Tensor& t, const Tensor& x, int64_t last, const char* name,
                   const char* meaning) {
  at::DimVector shape(x.sizes());
  shape.back() = last;
  check_shape(op, t, shape, name, meaning);
  check_device(op, t, x, name);
  check_last_dim_contiguous(op, t, name);
}

// An int8 operand needs its scale and a float one must not have it.
void check_scale_presence(OpName op, const Tensor& t, const OptionalTensor& scale,
                          const char* name) {
  const bool is_int8 = t.scalar_type() == at::kChar;
  TORCH_CHECK_VALUE(is_int8 == scale.has_value(), op.name, ": expected ", name, "_scale ",
                    is_int8 ? "with" : "None without", " an int8 ", name, ", got ",
                    scale.has_value() ? "a tensor" : "None");
}

void check_gate(OpName op, const ScanInputs& in) {
  const int64_t dim = in.x.size(-1);
  if (!in.z.has_value()) {
    TORCH_CHECK_VALUE(!in.z_scale.has_value() && !in.gate_scale.has_value(), op.name,
                      ": expected z_scale and gate_scale None without z, got a tensor");
    return;
  }
  float_or_int8_dtype(op, *in.z, "z");
  check_operand(op, *in.z, in.x, dim, "z", "that of x");
  check_scale_presence(op, *in.z, in.z_scale, "z");
  check_parameter(op, in.z_scale, at::kFloat, {dim}, in.x, "z_scale", "(dim,)");
  check_parameter(op, in.gate_scale, at::kFloat, {dim}, in.x, "gate_scale", "(dim,)");
}

void check_readout(OpName op, const ScanInputs& in, int64_t dstate) {
  if (!in.readout_scale.has_value()) {
    TORCH_CHECK_VALUE(!in.rotate_state, op.name,
                      ": expected rotate_state False without readout_scale, got True");
    return;
  }
  check_parameter(op, *in.readout_scale, at::kFloat, {in.x.size(-1)}, in.x, "readout_scale",
                  "(dim,)");
  TORCH_CHECK_TYPE(in.C.scalar_type() == at::kChar, op.name,
                   ": expected C of dtype int8 with readout_scale, got ", in.C.scalar_type());
  TORCH_CHECK_VALUE(!in.rotate_state || (dstate & (dstate - 1)) == 0, op.name,
                    ": expected dstate to be a power of two with rotate_state, got ", dstate);
}

void check_addend(OpName op, const OptionalTensor& addend, const Tensor& x) {
  if (!addend.has_value()) return;
  float_dtype(op, addend->scalar_type(), "addend");
  check_operand(op, *addend, x, x.size(-1), "addend", "that of x");
}

void check_inputs(OpName op, const ScanInputs& in, int64_t dims) {
  check_dtype(op, in.x, at::kChar, "x");
  check_dim(op, in.x, dims, "x");
  check_last_dim_contiguous(op, in.x, "x");
  const int64_t dim = in.x.size(-1);
  check_dim(op, in.A, 2, "A");
  const int64_t dstate = in.A.size(0);
  TORCH_CHECK_VALUE(dstate >= 1 && dstate <= kMaxDState, op.name,
                    ": expected A with dstate from 1 to ", kMaxDState, ", got ", dstate);
  check_parameter(op, in.A, at::kFloat, {dstate, dim}, in.x, "A", "(dstate, dim)");
  check_parameter(op, in.x_scale, at::kFloat, {dim}, in.x, "x_scale", "(dim,)");
  check_parameter(op, in.x_zero_point, at::kInt, {dim}, in.x, "x_zero_point", "(dim,)");
  float_dtype(op, in.dt.scalar_type(), "dt");
  check_operand(op, in.dt, in.x, dim, "dt", "that of x");
  check_parameter(op, in.dt_bias, at::kFloat, {dim}, in.x, "dt_bias", "(dim,)");
  float_or_int8_dtype(op, in.B, "B");
  check_operand(op, in.B, in.x, dstate, "B", "(..., dstate)");
  check_scale_presence(op, in.B, in.B_scale, "B");
  check_parameter(op, in.B_scale, at::kFloat, {dstate}, in.x, "B_scale", "(dstate,)");
  float_or_int8_dtype(op, in.C, "C");
  check_operand(op, in.C, in.x, dstate, "C", "(..., dstate)");
  check_scale_presence(op, in.C, in.C_scale, "C");
  check_parameter(op, in.C_scale, at::kFloat, {1}, in.x, "C_scale", "(1,)");
  check_parameter(op, in.D, at::kFloat, {dim}, in.x, "D", "(dim,)");
  check_gate(op, in);
  check_readout(op, in, dstate);
}

int64_t token_stride(const Tensor& t) { return t.dim() == 3 ? t.stride(1) : 0; }

void set_strided_operands(OpName op, const ScanInputs& in, SelectiveScanParams* p) {
  p->x_stride_batch = in.x.stride(0);
  p->x_stride_token = token_stride(in.x);
  p->x = in.x.const_data_ptr<int8_t>();
  p->dt_dtype = float_dtype(op, in.dt.scalar_type(), "dt");
  p->dt_stride_batch = in.dt.stride(0);
  p->dt_stride_token = token_stride(in.dt);
  p->dt = in.dt.const_data_ptr();
  p->B_dtype = float_or_int8_dtype(op, in.B, "B");
  p->B_stride_batch = in.B.stride(0);
  p->B_stride_token = token_stride(in.B);
  p->B = in.B.const_data_ptr();
  p->C_dtype = float_or_int8_dtype(op, in.C, "C");
  p->C_stride_batch = in.C.stride(0);
  p->C_stride_token = token_stride(in.C);
  p->C = in.C.const_data_ptr();
  if (!in.z.has_value()) return;
  p->z_dtype = float_or_int8_dtype(op, *in.z, "z");
  p->z_stride_batch = in.z->stride(0);
  p->z_stride_token = token_stride(*in.z);
  p->z = in.z->const_data_ptr();
}

void set_addend(OpName op, const OptionalTensor& addend, SelectiveScanParams* p) {
  if (!addend.has_value()) return;
  p->addend_dtype = float_dtype(op, addend->scalar_type(), "addend");
  p->addend_stride_batch = addend->stride(0);
  p->addend_stride_token = token_stride(*addend);
  p->addend = addend->const_data_ptr();
}

SelectiveScanParams make_params(OpName op, const ScanInputs& in, Tensor& y) {
  SelectiveScanParams p;
  p.batch = in.x.size(0);
  p.seqlen = in.x.dim() == 3 ? in.x.size(1) : 1;
  p.dim = in.x.size(-1);
  p.dstate = in.A.size(0);
  set_strided_operands(op, in, &p);
  p.x_scale = in.x_scale.const_data_ptr<float>();
  p.x_zero_point = data_or_null<int32_t>(in.x_zero_point);
  p.dt_bias = data_or_null<float>(in.dt_bias);
  p.A = in.A.const_data_ptr<float>();
  p.B_scale = data_or_null<float>(in.B_scale);
  p.C_scale = data_or_null<float>(in.C_scale);
  p.D = data_or_null<float>(in.D);
  p.z_scale = data_or_null<float>(in.z_scale);
  p.gate_scale = data_or_null<float>(in.gate_scale);
  p.readout_scale = data_or_null<float>(in.readout_scale);
  p.rotate_state = in.rotate_state;
  p.y_dtype = float_dtype(op, y.scalar_type(), "dtype");
  p.y = y.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> selective_scan(
    const Tensor& x, const Tensor& x_scale, const OptionalTensor& x_zero_point, const Tensor& dt,
    const OptionalTensor& dt_bias, const Tensor& A, const Tensor& B, const OptionalTensor& B_scale,
    const Tensor& C, const OptionalTensor& C_scale, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& z_scale, const OptionalTensor& gate_scale,
    const OptionalTensor& readout_scale, bool rotate_state, const OptionalTensor& initial_state,
    bool reverse, const OptionalTensor& order, const OptionalTensor& addend, int64_t chunk_size,
    at::ScalarType dtype) {
  constexpr OpName op{"selective_scan"};
  const ScanInputs in{
      x, x_scale, x_zero_point, dt,         dt_bias,       A,           B, B_scale, C, C_scale,
      D, z,       z_scale,      gate_scale, readout_scale, rotate_state};
  check_inputs(op, in, 3);
  const int64_t state_shape[] = {x.size(0), A.size(0), x.size(2)};
  check_parameter(op, initial_state, at::kFloat, state_shape, x, "initial_state",
                  "(batch, dstate, dim)");
  check_order(op, order, x.size(1), x);
  check_addend(op, addend, x);
  TORCH_CHECK_VALUE(chunk_size >= 0, op.name, ": expected chunk_size 0 (automatic) or more, got ",
                    chunk_size);
  float_dtype(op, dtype, "dtype");
  Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  Tensor final_state = at::empty(state_shape, x.options().dtype(at::kFloat));
  SelectiveScanParams p = make_params(op, in, y);
  p.initial_state = data_or_null<float>(initial_state);
  p.final_state = final_state.data_ptr<float>();
  p.reverse = reverse;
  p.order = data_or_null<int32_t>(order);
  set_addend(op, addend, &p);
  p.chunk_size = chunk_size;
  if (chunk_size == 0) {
    p.chunk_size = by_backend(
        x, [&] { return cpu::selective_scan_chunk_size(p, at::get_num_threads()); },
        [&] { return cuda::selective_scan_chunk_size(p); });
  }
  const int64_t workspace_bytes = by_backend(
      x, [&] { return cpu::selective_scan_workspace_bytes(p); },
      [&] { return cuda::selective_scan_workspace_bytes(p); });
  Tensor workspace = at::empty({workspace_bytes / static_cast<int64_t>(sizeof(float))},
                               x.options().dtype(at::kFloat));
  p.workspace = workspace.data_ptr<float>();
  launch(
      op,
      buffers_of(x, x_scale, x_zero_point, dt, dt_bias, A, B, B_scale, C, C_scale, D, z, z_scale,
                 gate_scale, readout_scale, initial_state, order, addend, y, final_state,
                 workspace),
      [&](const Threads& threads) { return cpu::selective_scan(p, threads); },
      [&](Stream stream) { return cuda::selective_scan(p, stream); });
  return {y, final_state};
}

Tensor selective_scan_update(const Tensor& ssm_state, const Tensor& x, const Tensor& x_scale,
                             const OptionalTensor& x_zero_point, const Tensor& dt,
                             const OptionalTensor& dt_bias, const Tensor& A, const Tensor& B,
                             const OptionalTensor& B_scale, const Tensor& C,
                             const OptionalTensor& C_scale, const OptionalTensor& D,
                             const OptionalTensor& z, const OptionalTensor& z_scale,
                             const OptionalTensor& gate_scale, const OptionalTensor& readout_scale,
                             bool rotate_state, at::ScalarType dtype) {
  constexpr OpName op{"selective_scan_update"};
  const ScanInputs in{
      x, x_scale, x_zero_point, dt,         dt_bias,       A,           B, B_scale, C, C_scale,
      D, z,       z_scale,      gate_scale, readout_scale, rotate_state};
  check_inputs(op, in, 2);
  check_parameter(op, ssm_state, at::kFloat, {x.size(0), A.size(0), x.size(1)}, x, "ssm_state",
                  "(batch, dstate, dim)");
  float_dtype(op, dtype, "dtype");
  Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  SelectiveScanParams p = make_params(op, in, y);
  p.initial_state = ssm_state.const_data_ptr<float>();
  p.final_state = ssm_state.data_ptr<float>();
  p.chunk_size = 1;
  launch(
      op,
      buffers_of(x, x_scale, x_zero_point, dt, dt_bias, A, B, B_scale, C, C_scale, D, z, z_scale,
                 gate_scale, readout_scale, ssm_state, y),
      [&](const Threads& threads) { return cpu::selective_scan(p, threads); },
      [&](Stream stream) { return cuda::selective_scan(p, stream); });
  return y;
}

void register_ops(torch::Library& m) {
  m.impl("selective_scan", &selective_scan);
  m.impl("selective_scan_update", &selective_scan_update);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
