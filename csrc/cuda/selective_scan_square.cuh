// selective_scan: four tokens by four channels between global memory and registers, v[token][channel].
//
// A square that exists in full and lies on vector borders moves by four vectors of four elements; one at
// an edge, or of a tensor that is not so aligned, element by element. Which of the two is a branch that all
// threads but those at an edge take alike.
#pragma once

#include "cuda/selective_scan_channel.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kGroup = 4;  // tokens

// The rows of a square, one after another.
struct StridedRows {
  const char* row;
  int64_t stride;
  __device__ const char* next() {
    const char* current = row;
    row += stride;
    return current;
  }
};
struct RoutedRows {
  Cursor cursor;  // at token 0
  const int32_t* token;
  __device__ const char* next() { return cursor.at(*token++); }
};

// Four tokens in storage order, or turned round: the part that exists, from the first token and channel.
struct StridedSquare {
  int32_t tokens, channels;
  __device__ bool has(int32_t t) const { return t < tokens; }
  __device__ bool has(int32_t t, int32_t i) const { return t < tokens && i < channels; }
  __device__ bool has_all_tokens() const { return tokens >= kGroup; }
  // cursor: at the first token
  __device__ StridedRows rows(const Cursor& cursor) const { return {cursor.row, cursor.stride}; }
};

// Four tokens wherever the walk finds them.
struct RoutedSquare {
  int32_t token[kGroup];  // in storage, or kNoToken
  int32_t channels;
  __device__ bool has(int32_t t) const { return token[t] >= 0; }
  __device__ bool has(int32_t t, int32_t i) const { return token[t] >= 0 && i < channels; }
  __device__ bool has_all_tokens() const {
    return (token[0] | token[1] | token[2] | token[3]) >= 0;
  }
  // cursor: at token 0
  __device__ RoutedRows rows(const Cursor& cursor) const { return {cursor, token}; }
};

// Four neighbours as one built-in vector. Moved by __ldcg and __stcg: through L2 alone, as what is used once
// should be, and in one piece, whereas the compiler would take a plain access apart to share loads and stores
// with the path for single elements.
template <typename T>
struct FourHalves {
  using Raw = uint2;
  static __device__ float4 floats(const uint2& raw) {
    const auto v = __builtin_bit_cast(Vec<T, 4>, raw);
    return {to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])};
  }
  static __device__ uint2 raw(const float4& v) {
    const Vec<T, 4> four{
        {from_float<T>(v.x), from_float<T>(v.y), from_float<T>(v.z), from_float<T>(v.w)}};
    return __builtin_bit_cast(uint2, four);
  }
};
template <typename T>
struct Four;
template <>
struct Four<float> {
  using Raw = float4;
  static __device__ float4 floats(const float4& v) { return v; }
  static __device__ float4 raw(const float4& v) { return v; }
};
template <>
struct Four<__half> : FourHalves<__half> {};
template <>
struct Four<__nv_bfloat16> : FourHalves<__nv_bfloat16> {};
template <>
struct Four<int8_t> {
  using Raw = uint32_t;
  static __device__ float4 floats(uint32_t raw) {
    float v[4];
    shifted_bytes(raw ^ kFlipSigns, v);
    return {v[0] - kByteShift, v[1] - kByteShift, v[2] - kByteShift, v[3] - kByteShift};
  }
};

// load_full: the square exists in full, on vector borders.
template <typename T, typename Rows>
__device__ inline void load_full(Rows rows, float (&v)[4][4]) {
#pragma unroll
  for (int32_t t = 0; t < 4; ++t) {
    const float4 four =
        Four<T>::floats(__ldcg(reinterpret_cast<const typename Four<T>::Raw*>(rows.next())));
    v[t][0] = four.x;
    v[t][1] = four.y;
    v[t][2] = four.z;
    v[t][3] = four.w;
  }
}
template <typename Rows>
__device__ inline void load_full(const Rows& rows, DType dtype, float (&v)[4][4]) {
  if (dtype == DType::kF32) {
    load_full<float>(rows, v);
  } else if (dtype == DType::kI8) {
    load_full<int8_t>(rows, v);
  } else if (dtype == DType::kF16) {
    load_full<__half>(rows, v);
  } else {
    load_full<__nv_bfloat16>(rows, v);
  }
}
// Elements that do not exist get `absent`.
template <typename Square>
__device__ inline void load_part(const Cursor& cursor, DType dtype, const Square& square,
                                 float absent, float (&v)[4][4]) {
  auto rows = square.rows(cursor);
#pragma unroll
  for (int32_t t = 0; t < 4; ++t) {
    const char* row = rows.next();
#pragma unroll
    for (int32_t i = 0; i < 4; ++i)
      v[t][i] = square.has(t, i) ? load_element(row, dtype, i) : absent;
  }
}

// Words of bytes, a word for each token.
template <typename Rows>
__device__ inline uint4 load_full_bytes(Rows rows) {
  uint4 words;
  words.x = __ldcg(reinterpret_cast<const uint32_t*>(rows.next()));
  words.y = __ldcg(reinterpret_cast<const uint32_t*>(rows.next()));
  words.z = __ldcg(reinterpret_cast<const uint32_t*>(rows.next()));
  words.w = __ldcg(reinterpret_cast<const uint32_t*>(rows.next()));
  return words;
}
// 0 for bytes that do not exist.
__device__ inline uint32_t load_bytes(const char* p, int32_t count) {
  uint32_t word = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if (i < count) word |= static_cast<uint32_t>(static_cast<uint8_t>(p[i])) << (8 * i);
  }
  return word;
}
template <typename Square>
__device__ inline uint4 load_part_bytes(const Cursor& cursor, const Square& square) {
  auto rows = square.rows(cursor);
  uint32_t words[4];
#pragma unroll
  for (int32_t t = 0; t < 4; ++t)
    words[t] = load_bytes(rows.next(), square.has(t) ? square.channels : 0);
  return {words[0], words[1], words[2], words[3]};
}

template <typename T, typename Rows>
__device__ inline void store_full(Rows rows, const float (&v)[4][4]) {
#pragma unroll
  for (int32_t t = 0; t < 4; ++t) {
    __stcg(reinterpret_cast<typename Four<T>::Raw*>(const_cast<char*>(rows.next())),
           Four<T>::raw({v[t][0], v[t][1], v[t][2], v[t][3]}));
  }
}
template <typename Rows>
__device__ inline void store_full(const Rows& rows, DType dtype, const float (&v)[4][4]) {
  if (dtype == DType::kF32) {
    store_full<float>(rows, v);
  } else if (dtype == DType::kF16) {
    store_full<__half>(rows, v);
  } else {
    store_full<__nv_bfloat16>(rows, v);
  }
}
template <typename Square>
__device__ inline void store_part(const Cursor& cursor, DType dtype, const Square& square,
                                  const float (&v)[4][4]) {
  auto rows = square.rows(cursor);
#pragma unroll
  for (int32_t t = 0; t < 4; ++t) {
    char* row = const_cast<char*>(rows.next());
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      if (square.has(t, i)) store_element(row, dtype, i, v[t][i]);
    }
  }
}

}  // namespace mambaquant::cuda
