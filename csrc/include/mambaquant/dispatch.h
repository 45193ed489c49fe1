// The only dispatch macros of the project: from a runtime value to a compile-time one. Each is an
// expression of type Status; a value with no kernel comes back as Status::unsupported.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

// Storage types of the half-precision formats; arithmetic is always in float.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct TypeTag {
  using type = T;
};
template <int64_t kValue>
struct IntTag {
  static constexpr int64_t value = kValue;
};

}  // namespace mambaquant

// Calls `body` (a generic lambda) with TypeTag<float | Float16 | BFloat16>.
#define MBQ_DISPATCH_FLOAT(dtype, body)                                                            \
  ((dtype) == ::mambaquant::DType::kF32   ? (body)(::mambaquant::TypeTag<float>{})                 \
   : (dtype) == ::mambaquant::DType::kF16 ? (body)(::mambaquant::TypeTag<::mambaquant::Float16>{}) \
   : (dtype) == ::mambaquant::DType::kBF16                                                         \
       ? (body)(::mambaquant::TypeTag<::mambaquant::BFloat16>{})                                   \
       : ::mambaquant::Status::unsupported("expected dtype float32, float16 or bfloat16"))

// As above, and int8 too.
#define MBQ_DISPATCH_FLOAT_OR_INT8(dtype, body)                                  \
  ((dtype) == ::mambaquant::DType::kI8 ? (body)(::mambaquant::TypeTag<int8_t>{}) \
                                       : MBQ_DISPATCH_FLOAT(dtype, body))

// Calls `body` with IntTag<1> or IntTag<0>.
#define MBQ_DISPATCH_BOOL(condition, body) \
  ((condition) ? (body)(::mambaquant::IntTag<1>{}) : (body)(::mambaquant::IntTag<0>{}))
