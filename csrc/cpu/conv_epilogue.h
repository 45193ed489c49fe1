// The epilogue of the convolutions (mambaquant/conv_epilogue.h) for one vector of channels.
#pragma once

#include "cpu/simd/math.h"
#include "mambaquant/conv_epilogue.h"

namespace mambaquant::cpu::MBQ_ISA {
namespace {

struct ConvEpilogue {
  // Of channels [c, c + n).
  ConvEpilogue(const ConvEpilogueParams& p, int64_t c, int64_t n)
      : scale(load_up_to(p.x_scale + c, n) * load_up_to(p.weight_scale + c, n)),
        bias(p.bias == nullptr ? set1(0.0f) : load_up_to(p.bias + c, n)),
        inv_out_scale(set1(1.0f) / load_up_to(p.out_scale + c, n)) {
    const bool is_symmetric = p.out_zero_point == nullptr;
    const I32 zero = is_symmetric ? set1_i32(0) : load_i32_up_to(p.out_zero_point + c, n);
    lowest = set1_i32(kIntegerBits + (is_symmetric ? kQMinSymmetric : kQMinAsymmetric)) - zero;
    offset = zero - set1_i32(kIntegerBits);
  }

  // The first n of acc's channels, quantized, to q. A sum with kInteger has the nearest integer in its last
  // bits; integer operations do the rest, and the store saturates at 127. What lies so far below that the
  // sum is negative is so as an integer too.
  void store_quantized(int8_t* q, F32 acc, int64_t n) const {
    const F32 y = silu(fma(acc, scale, bias));
    const I32 rounded = bits_of(fma(y, inv_out_scale, set1(kInteger)));
    store_up_to(q, max(rounded, lowest) + offset, n);
  }

  static constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23
  static constexpr int32_t kIntegerBits = 0x4b400000;
  F32 scale, bias, inv_out_scale;
  I32 lowest{}, offset{};
};

}  // namespace
}  // namespace mambaquant::cpu::MBQ_ISA
