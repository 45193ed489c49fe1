// hadamard_transform, hadamard_quantize: checks, allocation, params.
#include "mambaquant/hadamard.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <sstream>
#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"
#include "torch/hadamard_sizes.h"

namespace mambaquant::binding {

const HadamardBase* find_hadamard_base(int64_t n) {
  if (n < 1 || n > kMaxHadamardDim) return nullptr;
  for (const HadamardBase& base : kHadamardBases) {
    const int64_t block = n / base.order;
    if (n % base.order == 0 && (block & (block - 1)) == 0) return &base;
  }
  return nullptr;
}

std::vector<int64_t> supported_hadamard_sizes() {
  std::vector<int64_t> sizes;
  for (int64_t n = 1; n <= kMaxHadamardDim; ++n) {
    if (find_hadamard_base(n) != nullptr) sizes.push_back(n);
  }
  return sizes;
}

std::string unsupported_hadamard_size(int64_t n) {
  int64_t below = 0, above = 0;
  for (const int64_t size : supported_hadamard_sizes()) {
    if (size < n) below = size;
    if (size > n && above == 0) above = size;
  }
  std::ostringstream message;
  message << "p * 2^k with p = 1, or p = 3, 5, ... 15 and k >= 2, at most " << kMaxHadamardDim
          << " (nearest: ";
  if (below != 0) message << below;
  if (below != 0 && above != 0) message << " and ";
  if (above != 0) message << above;
  message << "), got " << n;
  return message.str();
}

namespace {

HadamardParams make_params(OpName op, const Tensor& x, bool inverse) {
  HadamardParams p;
  p.x_dtype = float_dtype(op, x.scalar_type(), "x");
  check_dim(op, x, 2, "x");
  check_last_dim_contiguous(op, x, "x");
  const HadamardBase* base = find_hadamard_base(x.size(1));
  TORCH_CHECK_VALUE(base != nullptr, op.name, ": expected x with a last dimension of ",
                    unsupported_hadamard_size(x.size(1)));
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.x_stride_token = x.stride(0);
  p.base_order = base->order;
  p.inverse = inverse;
  p.x = x.const_data_ptr();
  return p;
}

Tensor hadamard_transform(const Tensor& x, bool inverse) {
  constexpr OpName op{"hadamard_transform"};
  HadamardParams p = make_params(op, x, inverse);
  Tensor y = at::empty(x.sizes(), x.options());
  p.y = y.data_ptr();
  launch(
      op, buffers_of(x, y),
      [&](const Threads& threads) { return cpu::hadamard_transform(p, threads); },
      [&](Stream stream) { return cuda::hadamard_transform(p, stream); });
  return y;
}

std::tuple<Tensor, Tensor> hadamard_quantize(const Tensor& x, const OptionalTensor& scale) {
  constexpr OpName op{"hadamard_quantize"};
  HadamardParams p = make_params(op, x, false);
  check_parameter(op, scale, at::kFloat, {1}, x, "scale", "(1,)");
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  Tensor scale_out = at::empty({scale.has_value() ? 0 : x.size(0)}, x.options().dtype(at::kFloat));
  p.scale = data_or_null<float>(scale);
  p.q = q.data_ptr<int8_t>();
  p.scale_out = scale_out.data_ptr<float>();
  launch(
      op, buffers_of(x, scale, q, scale_out),
      [&](const Threads& threads) { return cpu::hadamard_quantize(p, threads); },
      [&](Stream stream) { return cuda::hadamard_quantize(p, stream); });
  return {q, scale_out};
}

void register_ops(torch::Library& m) {
  m.impl("hadamard_transform", &hadamard_transform);
  m.impl("hadamard_quantize", &hadamard_quantize);
}

}  // namespace

MBQ_REGISTER(register_ops)

}  // namespace mambaquant::binding
