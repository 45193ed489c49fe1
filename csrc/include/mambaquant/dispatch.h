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

// Calls the body (a generic lambda) with TypeTag<float | Float16 | BFloat16>.
#define MBQ_DISPATCH_FLOAT(dtype, ...)                                                  \
  ((dtype) == ::mambaquant::DType::kF32 ? (__VA_ARGS__)(::mambaquant::TypeTag<float>{}) \
   : (dtype) == ::mambaquant::DType::kF16                                               \
       ? (__VA_ARGS__)(::mambaquant::TypeTag<::mambaquant::Float16>{})                  \
   : (dtype) == ::mambaquant::DType::kBF16                                              \
       ? (__VA_ARGS__)(::mambaquant::TypeTag<::mambaquant::BFloat16>{})                 \
       : ::mambaquant::Status::unsupported("expected dtype float32, float16 or bfloat16"))

// As above, and int8 too.
#define MBQ_DISPATCH_FLOAT_OR_INT8(dtype, ...)                                          \
  ((dtype) == ::mambaquant::DType::kI8 ? (__VA_ARGS__)(::mambaquant::TypeTag<int8_t>{}) \
                                       : MBQ_DISPATCH_FLOAT(dtype, __VA_ARGS__))

// Calls the body with IntTag<1> or IntTag<0>.
#define MBQ_DISPATCH_BOOL(condition, ...)                 \
  ((condition) ? (__VA_ARGS__)(::mambaquant::IntTag<1>{}) \
               : (__VA_ARGS__)(::mambaquant::IntTag<0>{}))
