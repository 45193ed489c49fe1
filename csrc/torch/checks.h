// Argument checks of the torch binding. Message form: "op: expected NAME ..., got ...". Shape and value
// problems raise ValueError, wrong dtypes TypeError, what no kernel serves NotImplementedError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "mambaquant/types.h"

namespace mambaquant::binding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The operator's name, for messages.
struct OpName {
  const char* name;
};

inline DType float_dtype(OpName op, at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat:
      return DType::kF32;
    case at::kHalf:
      return DType::kF16;
    case at::kBFloat16:
      return DType::kBF16;
    default:
      TORCH_CHECK_TYPE(false, op.name, ": expected ", name,
                       " of dtype float32, float16 or bfloat16, got ", type);
  }
}

inline DType float_or_int8_dtype(OpName op, const Tensor& t, const char* name) {
  if (t.scalar_type() == at::kChar) return DType::kI8;
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf ||
                       t.scalar_type() == at::kBFloat16,
                   op.name, ": expected ", name,
                   " of dtype int8, float32, float16 or bfloat16, got ", t.scalar_type());
  return float_dtype(op, t.scalar_type(), name);
}

inline void check_dtype(OpName op, const Tensor& t, at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == type, op.name, ": expected ", name, " of dtype ", type,
                   ", got ", t.scalar_type());
}

inline void check_dim(OpName op, const Tensor& t, int64_t dim, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == dim, op.name, ": expected ", name, " with ", dim,
                    " dimensions, got shape ", t.sizes());
}

// `meaning` spells the expected shape in the words of the docstring: "(dim,)".
inline void check_shape(OpName op, const Tensor& t, at::IntArrayRef shape, const char* name,
                        const char* meaning) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op.name, ": expected ", name, " of shape ", meaning, " = ",
                    shape, ", got ", t.sizes());
}

inline void check_last_dim_contiguous(OpName op, const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.numel() == 0 || t.size(-1) == 1 || t.stride(-1) == 1, op.name, ": expected ",
                    name, " with a contiguous last dimension, got strides ", t.strides());
}

inline void check_contiguous(OpName op, const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_contiguous(), op.name, ": expected ", name,
                    " to be contiguous, got strides ", t.strides(), " for shape ", t.sizes());
}

inline void check_device(OpName op, const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op.name, ": expected ", name, " on device ",
                    like.device(), ", got ", t.device());
}

// A small contiguous parameter vector or matrix: dtype, shape, device and layout in one call.
inline void check_parameter(OpName op, const Tensor& t, at::ScalarType type, at::IntArrayRef shape,
                            const Tensor& like, const char* name, const char* meaning) {
  check_dtype(op, t, type, name);
  check_shape(op, t, shape, name, meaning);
  check_device(op, t, like, name);
  check_contiguous(op, t, name);
}

inline void check_parameter(OpName op, const OptionalTensor& t, at::ScalarType type,
                            at::IntArrayRef shape, const Tensor& like, const char* name,
                            const char* meaning) {
  if (t.has_value()) check_parameter(op, *t, type, shape, like, name, meaning);
}

// Each token of [0, order.size()) once.
inline void check_permutation(OpName op, c10::ArrayRef<int32_t> order, const char* name) {
  const auto count = static_cast<int64_t>(order.size());
  std::vector<bool> is_seen(order.size(), false);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t token = order[static_cast<size_t>(t)];
    TORCH_CHECK_VALUE(token >= 0 && token < count, op.name, ": expected ", name,
                      " to hold tokens from 0 to ", count - 1, ", got ", token, " at position ", t);
    TORCH_CHECK_VALUE(!is_seen[static_cast<size_t>(token)], op.name, ": expected ", name,
                      " to hold each token once, got ", token, " again at position ", t);
    is_seen[static_cast<size_t>(token)] = true;
  }
}

// The order of a walk over the tokens of x. Its values are looked at on a CPU alone: elsewhere the call would wait
// for the device, and the kernels leave out what is no token.
inline void check_order(OpName op, const OptionalTensor& order, int64_t seqlen, const Tensor& x) {
  if (!order.has_value()) return;
  check_parameter(op, *order, at::kInt, {seqlen}, x, "order", "(seqlen,)");
  if (!order->is_cpu()) return;
  check_permutation(op, {order->const_data_ptr<int32_t>(), static_cast<size_t>(seqlen)}, "order");
}

// Null for an absent tensor.
template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace mambaquant::binding
