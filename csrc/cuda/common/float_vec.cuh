// Vectors of floating-point tensors whose dtype is known at run time. The branches on the dtype are the
// same for all threads, a few instructions per vector, and spare a kernel for every dtype (or pair).
//
// Loading and converting are two steps, so that several loads can be on their way before the first
// conversion waits.
#pragma once

#include <cstring>

#include "cuda/common/vec.cuh"

namespace mambaquant::cuda {

__host__ __device__ constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kF32 ? 4 : 2;
}
// `elements` beyond `base`.
__device__ inline const void* advance(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * element_size(dtype);
}
__device__ inline void* advance(void* base, int64_t elements, DType dtype) {
  return static_cast<char*>(base) + elements * element_size(dtype);
}

// Bits of kVec elements: 8 of 16 bits, or up to 4 of either width.
template <int32_t kVec>
struct RawVec {
  static_assert(kVec == 8 || kVec == 4 || kVec == 1);
  uint32_t words[kVec == 8 ? 4 : kVec];
};

// Whether a vector of kVec elements holds floats: one of 8 never does.
template <int32_t kVec>
__host__ __device__ constexpr bool is_float32(DType dtype) {
  return kVec <= 4 && dtype == DType::kF32;
}

// Elements [index, index + kVec) of `base`; the address is a multiple of the vector's size if is_aligned.
template <int32_t kVec>
__device__ inline RawVec<kVec> load_raw(const void* base, int64_t index, DType dtype,
                                        bool is_aligned = true) {
  RawVec<kVec> raw;
  if constexpr (kVec <= 4) {
    if (is_float32<kVec>(dtype)) {
      const auto in = load_vec<kVec>(static_cast<const uint32_t*>(base) + index, is_aligned);
      memcpy(raw.words, in.data, sizeof(in));
      return raw;
    }
  }
  const auto in = load_vec<kVec>(static_cast<const uint16_t*>(base) + index, is_aligned);
  if constexpr (kVec == 1) {
    raw.words[0] = in[0];
  } else {
    memcpy(raw.words, in.data, sizeof(in));
  }
  return raw;
}

template <int32_t kVec>
__device__ inline void store_raw(void* base, int64_t index, DType dtype, const RawVec<kVec>& raw,
                                 bool is_aligned = true) {
  if constexpr (kVec <= 4) {
    if (is_float32<kVec>(dtype)) {
      Vec<uint32_t, kVec> out;
      memcpy(out.data, raw.words, sizeof(out));
      return store_vec(static_cast<uint32_t*>(base) + index, out, is_aligned);
    }
  }
  Vec<uint16_t, kVec> out;
  if constexpr (kVec == 1) {
    out[0] = static_cast<uint16_t>(raw.words[0]);
  } else {
    memcpy(out.data, raw.words, sizeof(out));
  }
  store_vec(static_cast<uint16_t*>(base) + index, out, is_aligned);
}

__device__ inline float2 unpack_half2(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof(word));
  return __half22float2(pair);
}
__device__ inline float2 unpack_bfloat162(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
// Rounds to nearest, ties to even; x goes to the low half.
__device__ inline uint32_t pack_half2(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ inline uint32_t pack_bfloat162(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

template <int32_t kVec>
__device__ inline void to_floats(const RawVec<kVec>& raw, DType dtype, float (&out)[kVec]) {
  if constexpr (kVec <= 4) {
    if (is_float32<kVec>(dtype)) {
#pragma unroll
      for (int32_t i = 0; i < kVec; ++i) out[i] = __uint_as_float(raw.words[i]);
      return;
    }
  }
  const bool is_half = dtype == DType::kF16;
  if constexpr (kVec == 1) {
    out[0] = is_half ? unpack_half2(raw.words[0]).x : unpack_bfloat162(raw.words[0]).x;
  } else if (is_half) {
#pragma unroll
    for (int32_t i = 0; i < kVec; i += 2) {
      const float2 pair = unpack_half2(raw.words[i / 2]);
      out[i] = pair.x;
      out[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int32_t i = 0; i < kVec; i += 2) {
      const float2 pair = unpack_bfloat162(raw.words[i / 2]);
      out[i] = pair.x;
      out[i + 1] = pair.y;
    }
  }
}

// Rounds to the dtype.
template <int32_t kVec>
__device__ inline RawVec<kVec> from_floats(const float (&x)[kVec], DType dtype) {
  RawVec<kVec> raw;
  if constexpr (kVec <= 4) {
    if (is_float32<kVec>(dtype)) {
#pragma unroll
      for (int32_t i = 0; i < kVec; ++i) raw.words[i] = __float_as_uint(x[i]);
      return raw;
    }
  }
  const bool is_half = dtype == DType::kF16;
  if constexpr (kVec == 1) {
    raw.words[0] = is_half ? pack_half2(x[0], 0.0f) : pack_bfloat162(x[0], 0.0f);
  } else {
#pragma unroll
    for (int32_t i = 0; i < kVec; i += 2) {
      raw.words[i / 2] = is_half ? pack_half2(x[i], x[i + 1]) : pack_bfloat162(x[i], x[i + 1]);
    }
  }
  return raw;
}

// Stores x rounded to the dtype and leaves in x what was stored.
template <int32_t kVec>
__device__ inline void store_rounded(void* base, int64_t index, DType dtype, float (&x)[kVec],
                                     bool is_aligned = true) {
  if constexpr (kVec <= 4) {
    if (is_float32<kVec>(dtype)) {
      Vec<float, kVec> out;
#pragma unroll
      for (int32_t i = 0; i < kVec; ++i) out[i] = x[i];
      return store_vec(static_cast<float*>(base) + index, out, is_aligned);
    }
  }
  const RawVec<kVec> rounded = from_floats(x, dtype);
  store_raw(base, index, dtype, rounded, is_aligned);
  to_floats(rounded, dtype, x);
}

}  // namespace mambaquant::cuda
