// The epilogue of the convolutions (mambaquant/conv_epilogue.h) for one vector of channels.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/simd/quant.h"
#include "mambaquant/conv_epilogue.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

struct ConvEpilogue {
  // Of channels [c, c + n).
  ConvEpilogue(const ConvEpilogueParams& p, int64_t c, int64_t n)
      : scale(load(p.x_scale + c, n) * load(p.weight_scale + c, n)),
        bias(p.bias == nullptr ? set1(0.0f) : load(p.bias + c, n)),
        inv_out_scale(set1(1.0f) / load(p.out_scale + c, n)),
        zero_point(p.out_zero_point == nullptr ? set1(0.0f)
                                               : to_f32(load_i32(p.out_zero_point + c, n))),
        qmin(set1(
            static_cast<float>(p.out_zero_point == nullptr ? kQMinSymmetric : kQMinAsymmetric))) {}

  // The first n of acc's channels, quantized, to q.
  void store_quantized(int8_t* q, F32 acc, int64_t n) const {
    const F32 y = silu(acc * scale + bias);
    const F32 rounded = quantize_clamped(y, inv_out_scale, zero_point, qmin);
    if (n == kLanes) {
      store(q, rounded);
    } else {
      store(q, rounded, n);
    }
  }

  F32 scale, bias, inv_out_scale, zero_point, qmin;
};

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
