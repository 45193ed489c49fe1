// Bytes and floats without conversion instructions: those share a slow pipe with 2^x.
//
// NOTE(shifted-integers): a float in [2^23, 2^24) is an integer. 0x4b000000 | byte is 2^23 + byte, made by one
// byte permute; adding 1.5 * 2^23 to a small float rounds it to nearest, ties to even, and leaves the integer
// in the low bits.
#pragma once

#include <cstdint>

namespace mambaquant::cuda {

inline constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
inline constexpr uint32_t kRounderBits = 0x4b400000u;

// An int8 whose sign bit is flipped is a byte of 128 + the int8.
inline constexpr uint32_t kFlipSigns = 0x80808080u;  // of four
inline constexpr float kByteShift = 8388736.0f;      // 2^23 + 128

// out[i] = 2^23 + byte i of four.
__device__ inline void shifted_bytes(uint32_t four, float (&out)[4]) {
  asm("prmt.b32 %0, %1, 0x4b000000, 0x7440;" : "=f"(out[0]) : "r"(four));
  asm("prmt.b32 %0, %1, 0x4b000000, 0x7441;" : "=f"(out[1]) : "r"(four));
  asm("prmt.b32 %0, %1, 0x4b000000, 0x7442;" : "=f"(out[2]) : "r"(four));
  asm("prmt.b32 %0, %1, 0x4b000000, 0x7443;" : "=f"(out[3]) : "r"(four));
}

// An integer below 2^22, as a float, from its sum with kRounderBits.
__device__ inline float unshifted(int32_t sum) {
  float y;
  asm("sub.rn.f32 %0, %1, 0f4B400000;" : "=f"(y) : "r"(sum));
  return y;
}

// The low bytes of a, b, c and d, a's in the lowest place.
__device__ inline uint32_t packed_low_bytes(float a, float b, float c, float d) {
  uint32_t ab, cd, abcd;
  asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(ab) : "f"(a), "f"(b));
  asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(cd) : "f"(c), "f"(d));
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(abcd) : "r"(ab), "r"(cd));
  return abcd;
}

// Byte i of word j to byte j of word i.
__device__ inline uint4 transposed_bytes(const uint4& w) {
  const uint32_t low_xy = __byte_perm(w.x, w.y, 0x5140u), high_xy = __byte_perm(w.x, w.y, 0x7362u);
  const uint32_t low_zw = __byte_perm(w.z, w.w, 0x5140u), high_zw = __byte_perm(w.z, w.w, 0x7362u);
  return {__byte_perm(low_xy, low_zw, 0x5410u), __byte_perm(low_xy, low_zw, 0x7632u),
          __byte_perm(high_xy, high_zw, 0x5410u), __byte_perm(high_xy, high_zw, 0x7632u)};
}

}  // namespace mambaquant::cuda
