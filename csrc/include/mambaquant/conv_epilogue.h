// What follows the integer sum of every convolution, channel by channel: scale, bias, SiLU, int8.
//   v = acc * (x_scale[c] * weight_scale[c]) + bias[c]
//   q = clamp(rne(SiLU(v) * inv_out_scale[c]) + out_zero_point[c], qmin, 127)
// qmin is -127 without an out_zero_point and -128 with one.
#pragma once

#include "mambaquant/types.h"

namespace mambaquant {

struct ConvEpilogueParams {
  int64_t dim = 0;
  const float* x_scale = nullptr;           // (dim,)
  const float* weight_scale = nullptr;      // (dim,)
  const float* bias = nullptr;              // (dim,) or null
  const float* out_scale = nullptr;         // (dim,)
  const int32_t* out_zero_point = nullptr;  // (dim,) or null
};

}  // namespace mambaquant
