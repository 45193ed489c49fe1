// Element types on the device and vector access: a Vec<T, N> is N neighbouring elements, moved by
// one instruction of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mambaquant::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(int8_t x) { return static_cast<float>(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int32_t kCount>
struct alignas(sizeof(T) * kCount) Vec {
  static_assert(sizeof(T) * kCount <= 16, "one instruction moves at most 16 bytes");
  T data[kCount];
  __device__ T& operator[](int32_t i) { return data[i]; }
  __device__ const T& operator[](int32_t i) const { return data[i]; }
};

// Elements of T that 16 bytes hold.
template <typename T>
inline constexpr int32_t kVecWidth = 16 / static_cast<int32_t>(sizeof(T));

// Addresses are multiples of the vector's size.
template <int32_t kCount, typename T>
__device__ inline Vec<T, kCount> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, kCount>*>(p);
}
template <int32_t kCount, typename T>
__device__ inline void store_vec(T* p, const Vec<T, kCount>& v) {
  *reinterpret_cast<Vec<T, kCount>*>(p) = v;
}

// x, of which the compiler knows no more than its type: within a loop it does not see that a stride stays the same,
// and so does not turn each multiple of it into a register that is kept and counted on.
__device__ inline int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
// Nor does it work out again for each bit what the bits were made from.
__device__ inline uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The same elements one by one where addresses may lie between multiples of the vector's size.
template <int32_t kCount, typename T>
__device__ inline Vec<T, kCount> load_vec(const T* p, bool is_aligned) {
  if (is_aligned) return load_vec<kCount>(p);
  Vec<T, kCount> v;
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) v[i] = p[i];
  return v;
}
template <int32_t kCount, typename T>
__device__ inline void store_vec(T* p, const Vec<T, kCount>& v, bool is_aligned) {
  if (is_aligned) return store_vec(p, v);
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) p[i] = v[i];
}

}  // namespace mambaquant::cuda
