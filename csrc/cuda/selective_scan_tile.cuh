// selective_scan: a piece of the sequence in shared memory, and its way in and out.
//
// A tile is 64 channels by `groups` groups of four tokens, worked on by 64 threads. Moved in and out,
// a thread takes squares of four tokens by four channels, 16 bytes of a float32 row; scanned, it takes
// a channel, four tokens to a word:
//   steps[group][slot(c)][token % 4]  softplus(dt), later the read-out;  slot(c) = c ^ (c / 8 % 4), so that
//                                     eight threads meet all banks, whichever way they go
//   x[group][c][token % 4]            int8, signs flipped
//   B[token][state]                   float32;  C[token][state] float32, or int8 for the int8 read-outs
// Tokens beyond the end have step 0 and B = 0, which leave the state as it is.
#pragma once

#include <type_traits>

#include "cuda/selective_scan_channel.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kTileChannels = 64;
inline constexpr int32_t kGroup = 4;  // tokens

// Operands whose rows may be read by vectors of four elements.
enum VectorOperand : uint32_t { kVectorX = 1, kVectorDt = 2, kVectorZ = 4, kVectorY = 8, kVectorB = 16, kVectorC = 32 };

using Float4 = Vec<float, 4>;
using Word4 = Vec<uint32_t, 4>;

template <typename RowT>
struct Tile {
  Float4* steps;
  uint32_t* x;
  FloatRow* B;
  RowT* C;

  static constexpr int32_t kGroupBytes =
      kTileChannels * (sizeof(Float4) + sizeof(uint32_t)) + kGroup * (sizeof(FloatRow) + sizeof(RowT));

  __device__ Tile(char* memory, int32_t groups) {
    steps = reinterpret_cast<Float4*>(memory);
    x = reinterpret_cast<uint32_t*>(steps + groups * kTileChannels);
    B = reinterpret_cast<FloatRow*>(x + groups * kTileChannels);
    C = reinterpret_cast<RowT*>(B + groups * kGroup);
  }
};

__device__ inline int32_t slot_of(int32_t c) { return c ^ (c / 8 % 4); }

// Where a tile lies; `thread` counts from 0 to 63.
struct TilePlace {
  int64_t batch, token, c;
  int32_t tokens;    // that exist, at most 4 * groups; 0 or less: none
  int32_t groups;
  int32_t channels;  // that exist
  int32_t thread;
  uint32_t vectors;  // VectorOperand
};

// The part of a square that exists.
struct Square {
  int32_t tokens, channels;
  bool by_vectors;
};

template <typename T>
__device__ inline Vec<T, 4> load_four(const T* p, const Square& square) {
  if (square.by_vectors) return load_vec<4>(p);
  Vec<T, 4> v;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) v[i] = i < square.channels ? p[i] : T{};
  return v;
}
template <typename T>
__device__ inline void store_four(T* p, const Vec<T, 4>& v, const Square& square) {
  if (square.by_vectors) return store_vec(p, v);
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if (i < square.channels) p[i] = v[i];
  }
}

// out[token][channel]; tokens that do not exist get `absent`.
template <typename T>
__device__ inline void load_square(const T* row, int64_t stride, const Square& square, float absent,
                                   float (&out)[4][4]) {
#pragma unroll
  for (int32_t t = 0; t < 4; ++t, row += stride) {
    if (t < square.tokens) {
      const Vec<T, 4> v = load_four(row, square);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) out[t][i] = to_float(v[i]);
    } else {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) out[t][i] = absent;
    }
  }
}
__device__ inline uint32_t word_of(const Vec<int8_t, 4>& v) {
  uint32_t word = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) word |= static_cast<uint32_t>(static_cast<uint8_t>(v[i])) << (8 * i);
  return word;
}
__device__ inline uint32_t load_word(const int8_t* p, const Square& square) {
  if (square.by_vectors) return *reinterpret_cast<const uint32_t*>(p);
  return word_of(load_four(p, square));
}
// words[token], a byte for each channel.
__device__ inline void load_square(const int8_t* row, int64_t stride, const Square& square, uint32_t (&words)[4]) {
#pragma unroll
  for (int32_t t = 0; t < 4; ++t, row += stride) words[t] = t < square.tokens ? load_word(row, square) : 0u;
}

template <typename T>
__device__ inline void store_square(T* row, int64_t stride, const Square& square, const float (&y)[4][4]) {
#pragma unroll
  for (int32_t t = 0; t < 4; ++t, row += stride) {
    if (t >= square.tokens) break;
    Vec<T, 4> v;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) v[i] = from_float<T>(y[t][i]);
    store_four(row, v, square);
  }
}

// Byte [i][j] to [j][i].
__device__ inline Word4 transposed(const uint32_t (&w)[4]) {
  const uint32_t low01 = __byte_perm(w[0], w[1], 0x5140u), high01 = __byte_perm(w[0], w[1], 0x7362u);
  const uint32_t low23 = __byte_perm(w[2], w[3], 0x5140u), high23 = __byte_perm(w[2], w[3], 0x7362u);
  return {{__byte_perm(low01, low23, 0x5410u), __byte_perm(low01, low23, 0x7632u),
           __byte_perm(high01, high23, 0x5410u), __byte_perm(high01, high23, 0x7632u)}};
}

// The squares of a thread: one column of four channels, every fourth group.
struct ThreadColumn {
  int32_t c, group, channels;  // c within the tile
  __device__ explicit ThreadColumn(const TilePlace& place) {
    c = place.thread % (kTileChannels / 4) * 4;
    group = place.thread / (kTileChannels / 4);
    channels = place.channels - c;
  }
  __device__ Square square(const TilePlace& place, int32_t g, VectorOperand operand) const {
    return {place.tokens - g * kGroup, channels, (place.vectors & operand) != 0 && channels >= 4};
  }
};
inline constexpr int32_t kGroupsAtOnce = 4;

// dt and x: global to shared memory.
template <typename RowT>
__device__ inline void load_channels(const SelectiveScanParams& p, const TilePlace& place, const Tile<RowT>& tile) {
  const ThreadColumn column(place);
  const int64_t c = place.c + column.c;
  float bias[4];
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) bias[i] = i < column.channels ? load_dt_bias(p, c + i) : 0.0f;
  for (int32_t g = column.group; g < place.groups; g += kGroupsAtOnce) {
    const int64_t token = place.token + g * kGroup;
    const int64_t dt_offset = place.batch * p.dt_stride_batch + token * p.dt_stride_token + c;
    const int64_t x_offset = place.batch * p.x_stride_batch + token * p.x_stride_token + c;
    uint32_t words[4];
    load_square(p.x + x_offset, p.x_stride_token, column.square(place, g, kVectorX), words);
    const Square square = column.square(place, g, kVectorDt);
    constexpr float kNoStep = -__builtin_huge_valf();  // softplus makes it 0
    float dt[4][4];
    if (p.dt_dtype == DType::kF32) {
      load_square(static_cast<const float*>(p.dt) + dt_offset, p.dt_stride_token, square, kNoStep, dt);
    } else if (p.dt_dtype == DType::kF16) {
      load_square(static_cast<const __half*>(p.dt) + dt_offset, p.dt_stride_token, square, kNoStep, dt);
    } else {
      load_square(static_cast<const __nv_bfloat16*>(p.dt) + dt_offset, p.dt_stride_token, square, kNoStep, dt);
    }
    Word4 x = transposed(words);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) x[i] ^= kFlipSigns;
    store_vec(tile.x + g * kTileChannels + column.c, x);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      Float4 steps;
#pragma unroll
      for (int32_t t = 0; t < 4; ++t) steps[t] = softplus(dt[t][i] + bias[i]);
      tile.steps[g * kTileChannels + slot_of(column.c + i)] = steps;
    }
  }
}

// Four elements of a row of B or C; states that do not exist cannot be asked for.
__device__ inline Float4 load_states(const void* base, DType dtype, int64_t offset, bool by_vectors) {
  const Square square{1, 4, by_vectors};
  float v[4][4];
  if (dtype == DType::kI8) {
    load_square(static_cast<const int8_t*>(base) + offset, 0, square, 0.0f, v);
  } else if (dtype == DType::kF32) {
    load_square(static_cast<const float*>(base) + offset, 0, square, 0.0f, v);
  } else if (dtype == DType::kF16) {
    load_square(static_cast<const __half*>(base) + offset, 0, square, 0.0f, v);
  } else {
    load_square(static_cast<const __nv_bfloat16*>(base) + offset, 0, square, 0.0f, v);
  }
  return {{v[0][0], v[0][1], v[0][2], v[0][3]}};
}

__device__ inline void store_states(FloatRow* row, int32_t n, const Float4& v) {
  store_vec(row->data + n, v);
}

// B and C: global to shared memory, four states at a time.
template <typename RowT>
__device__ inline void load_state_rows(const SelectiveScanParams& p, const TilePlace& place, const Tile<RowT>& tile) {
  constexpr int32_t kVectors = kStates / 4;
  const int32_t n = place.thread % kVectors * 4;
  Float4 B_scale, C_scale;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    B_scale[i] = p.B_scale == nullptr ? 1.0f : p.B_scale[n + i];
    C_scale[i] = p.C_scale == nullptr ? 1.0f : *p.C_scale;
  }
  for (int32_t t = place.thread / kVectors; t < place.groups * kGroup; t += kTileChannels / kVectors) {
    Float4 B{{0.0f, 0.0f, 0.0f, 0.0f}}, C = B;
    uint32_t C_word = 0;
    if (t < place.tokens) {
      const int64_t token = place.token + t;
      const int64_t C_offset = place.batch * p.C_stride_batch + token * p.C_stride_token + n;
      B = load_states(p.B, p.B_dtype, place.batch * p.B_stride_batch + token * p.B_stride_token + n,
                      (place.vectors & kVectorB) != 0);
      const bool by_vectors = (place.vectors & kVectorC) != 0;
      if constexpr (std::is_same_v<RowT, FloatRow>) {
        C = load_states(p.C, p.C_dtype, C_offset, by_vectors);
      } else {
        C_word = load_word(static_cast<const int8_t*>(p.C) + C_offset, {1, 4, by_vectors});
      }
    }
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      B[i] = __fmul_rn(B[i], B_scale[i]);
      C[i] = __fmul_rn(C[i], C_scale[i]);
    }
    store_vec(tile.B[t].data + n, B);
    if constexpr (std::is_same_v<RowT, FloatRow>) {
      store_vec(tile.C[t].data + n, C);
    } else {
      tile.C[t].words[n / 4] = C_word;
    }
  }
}

// z as float, before its scale.
__device__ inline void load_z(const SelectiveScanParams& p, int64_t offset, const Square& square, float (&z)[4][4]) {
  if (p.z_dtype == DType::kI8) {
    uint32_t words[4];
    load_square(static_cast<const int8_t*>(p.z) + offset, p.z_stride_token, square, words);
#pragma unroll
    for (int32_t t = 0; t < 4; ++t) {
      words[t] ^= kFlipSigns;
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) z[t][i] = shifted_byte(words[t], i) - kByteShift;
    }
  } else if (p.z_dtype == DType::kF32) {
    load_square(static_cast<const float*>(p.z) + offset, p.z_stride_token, square, 0.0f, z);
  } else if (p.z_dtype == DType::kF16) {
    load_square(static_cast<const __half*>(p.z) + offset, p.z_stride_token, square, 0.0f, z);
  } else {
    load_square(static_cast<const __nv_bfloat16*>(p.z) + offset, p.z_stride_token, square, 0.0f, z);
  }
}

__device__ inline void store_y(const SelectiveScanParams& p, int64_t offset, int64_t stride, const Square& square,
                               const float (&y)[4][4]) {
  if (p.y_dtype == DType::kF32) {
    store_square(static_cast<float*>(p.y) + offset, stride, square, y);
  } else if (p.y_dtype == DType::kF16) {
    store_square(static_cast<__half*>(p.y) + offset, stride, square, y);
  } else {
    store_square(static_cast<__nv_bfloat16*>(p.y) + offset, stride, square, y);
  }
}

// The row of y that belongs to token `token` of the walk.
__device__ inline int64_t y_row(const SelectiveScanParams& p, int64_t batch, int64_t token) {
  return batch * p.seqlen + (p.reverse ? p.seqlen - 1 - token : token);
}

// Skip and gate; y: shared to global memory.
template <typename RowT>
__device__ inline void store_channels(const SelectiveScanParams& p, const TilePlace& place, const Tile<RowT>& tile) {
  const ThreadColumn column(place);
  const int64_t c = place.c + column.c;
  InputScale input[4];
  Output output[4];
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if (i < column.channels) {
      input[i] = load_input_scale(p, c + i);
      output[i] = load_output(p, c + i);
    } else {
      input[i] = {0.0f, 0.0f};
      output[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    input[i].zero += kByteShift;
  }
  for (int32_t g = column.group; g < place.groups; g += kGroupsAtOnce) {
    const Square square = column.square(place, g, kVectorY);
    if (square.tokens <= 0 || square.channels <= 0) break;
    const int64_t token = place.token + g * kGroup;
    float y[4][4];
    const Word4 x = load_vec<4>(tile.x + g * kTileChannels + column.c);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const Float4 sum = tile.steps[g * kTileChannels + slot_of(column.c + i)];
#pragma unroll
      for (int32_t t = 0; t < 4; ++t) y[t][i] = output[i].skip(sum[t], input[i](shifted_byte(x[i], t)));
    }
    if (p.z != nullptr) {
      float z[4][4];
      load_z(p, place.batch * p.z_stride_batch + token * p.z_stride_token + c, column.square(place, g, kVectorZ), z);
#pragma unroll
      for (int32_t t = 0; t < 4; ++t) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) y[t][i] = output[i].gated(y[t][i], z[t][i]);
      }
    }
    store_y(p, y_row(p, place.batch, token) * p.dim + c, p.reverse ? -p.dim : p.dim, square, y);
  }
}

}  // namespace mambaquant::cuda
