// selective_scan: a piece of the sequence in shared memory, and its way in and out.
//
// A tile is 64 channels by `groups` groups of four tokens, worked on by 64 threads. Moved in and out, a
// thread takes squares of four tokens by four channels; scanned, it takes a channel, four tokens to a word:
//   steps[group][slot(c)][token % 4]  softplus(dt), later y before the gate;  slot(c) = c ^ (c / 8 % 4), so
//                                     that eight threads meet all banks, whichever way they go
//   x[group][c][token % 4]            int8, signs flipped
//   B[token][state]                   float32;  C[token][state] float32, or int8 for the int8 read-outs
// Tokens beyond the end have step 0 and B = 0, which leave the state as it is.
#pragma once

#include <type_traits>

#include "cuda/selective_scan_square.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kTileChannels = 64;
inline constexpr int32_t kGroup = 4;         // tokens
inline constexpr int32_t kGroupsAtOnce = 4;  // that 64 threads move at a time, by squares

// Operands whose rows may be read by vectors of four elements.
enum VectorOperand : uint32_t {
  kVectorX = 1,
  kVectorDt = 2,
  kVectorZ = 4,
  kVectorY = 8,
  kVectorB = 16,
  kVectorC = 32
};

template <typename RowT>
struct Tile {
  float4* steps;
  uint32_t* x;
  FloatRow* B;
  RowT* C;

  static constexpr int32_t kGroupBytes =
      kTileChannels * (sizeof(float4) + sizeof(uint32_t)) + kGroup * (sizeof(FloatRow) + sizeof(RowT));

  __device__ Tile(char* memory, int32_t groups) {
    steps = reinterpret_cast<float4*>(memory);
    x = reinterpret_cast<uint32_t*>(steps + groups * kTileChannels);
    B = reinterpret_cast<FloatRow*>(x + groups * kTileChannels);
    C = reinterpret_cast<RowT*>(B + groups * kGroup);
  }
};

__device__ inline int32_t slot_of(int32_t c) { return c ^ (c / 8 % 4); }

// Where a tile lies.
struct TilePlace {
  int64_t batch, token, c;
  int32_t tokens;    // that exist, at most 4 * groups; 0: none
  int32_t groups;
  int32_t channels;  // that exist
  int32_t thread;    // 0 to 63
  uint32_t vectors;  // VectorOperand
};

// What the channels and states of a block need beside the tiles, in shared memory once: the threads that share a
// channel would each ask for it again. A in units of log2(e).
struct ScanScales {
  float dt_bias[kTileChannels], x_zero[kTileChannels], x_scale[kTileChannels], D[kTileChannels];
  float readout[kTileChannels], inv_readout[kTileChannels], z[kTileChannels], gate[kTileChannels];
  float B[kStates], C[kStates];
};

// By the first 64 threads of a block. A channel beyond the last has the scales of the first of the tile.
__device__ inline void load_scales(const SelectiveScanParams& p, int64_t c, int32_t thread, ScanScales* scales) {
  const InputScale input = load_input_scale(p, c);
  const Skip skip = load_skip(p, c);
  const Gate gate = load_gate(p, c);
  scales->dt_bias[thread] = load_dt_bias(p, c);
  scales->x_zero[thread] = input.zero + kByteShift;
  scales->x_scale[thread] = input.scale;
  scales->D[thread] = skip.D;
  scales->readout[thread] = skip.readout;
  scales->inv_readout[thread] = load_inv_readout_scale(p, c);
  scales->z[thread] = gate.z_scale;
  scales->gate[thread] = gate.gate_scale;
  if (thread < kStates) {
    scales->B[thread] = p.B_scale == nullptr ? 1.0f : p.B_scale[thread];
    scales->C[thread] = p.C_scale == nullptr ? 1.0f : *p.C_scale;
  }
}
__device__ inline float4 four_of(const float* p) { return *reinterpret_cast<const float4*>(p); }

// A thread's squares: one column of four channels, every fourth group.
struct ThreadColumn {
  int32_t c, group, channels;  // c within the tile
  __device__ explicit ThreadColumn(const TilePlace& place)
      : c(place.thread % (kTileChannels / 4) * 4),
        group(place.thread / (kTileChannels / 4)),
        channels(place.channels - c) {}
  __device__ Square square(const TilePlace& place, int32_t g, VectorOperand operand) const {
    return {place.tokens - g * kGroup, channels, (place.vectors & operand) != 0 && channels >= 4};
  }
};

// Step sizes after softplus, four tokens of a channel to a vector.
template <int32_t i>
__device__ inline void store_steps(const float (&dt)[4][4], float bias, float4* slot) {
  *slot = {softplus(dt[0][i] + bias), softplus(dt[1][i] + bias), softplus(dt[2][i] + bias), softplus(dt[3][i] + bias)};
}

// dt and x: global to shared memory.
template <typename RowT>
__device__ inline void load_channels(const SelectiveScanParams& p, const TilePlace& place, const ScanScales& scales,
                                     const Tile<RowT>& tile) {
  const ThreadColumn column(place);
  const int64_t c = place.c + column.c;
  const float4 bias = four_of(scales.dt_bias + column.c);
  float4* steps = tile.steps + column.group * kTileChannels;
  const int64_t token = place.token + column.group * kGroup;
  int64_t dt_offset = place.batch * p.dt_stride_batch + token * p.dt_stride_token + c;
  const int8_t* x = p.x + place.batch * p.x_stride_batch + token * p.x_stride_token + c;
  for (int32_t g = column.group; g < place.groups; g += kGroupsAtOnce) {
    constexpr float kNoStep = -__builtin_huge_valf();  // softplus makes it 0
    float dt[4][4];
    load_float_square(p.dt, p.dt_dtype, dt_offset, p.dt_stride_token, column.square(place, g, kVectorDt), kNoStep, dt);
    uint4 words = load_byte_square(x, p.x_stride_token, column.square(place, g, kVectorX));
    words = transposed_bytes(words);
    words = {words.x ^ kFlipSigns, words.y ^ kFlipSigns, words.z ^ kFlipSigns, words.w ^ kFlipSigns};
    *reinterpret_cast<uint4*>(tile.x + g * kTileChannels + column.c) = words;
    store_steps<0>(dt, bias.x, steps + slot_of(column.c));
    store_steps<1>(dt, bias.y, steps + slot_of(column.c + 1));
    store_steps<2>(dt, bias.z, steps + slot_of(column.c + 2));
    store_steps<3>(dt, bias.w, steps + slot_of(column.c + 3));
    steps += kGroupsAtOnce * kTileChannels;
    dt_offset += kGroupsAtOnce * kGroup * p.dt_stride_token;
    x += kGroupsAtOnce * kGroup * p.x_stride_token;
  }
}

// Four neighbouring states of a token of B or C.
__device__ inline float4 load_states(const void* base, DType dtype, int64_t offset, bool by_vectors) {
  if (dtype == DType::kI8 && by_vectors) {
    return Four<int8_t>::floats(__ldca(reinterpret_cast<const uint32_t*>(static_cast<const int8_t*>(base) + offset)));
  }
  if (dtype == DType::kF32 && by_vectors) {
    return __ldca(reinterpret_cast<const float4*>(static_cast<const float*>(base) + offset));
  }
  return {load_element(base, dtype, offset), load_element(base, dtype, offset + 1),
          load_element(base, dtype, offset + 2), load_element(base, dtype, offset + 3)};
}
__device__ inline float4 scaled(const float4& v, const float4& scale) {
  return {__fmul_rn(v.x, scale.x), __fmul_rn(v.y, scale.y), __fmul_rn(v.z, scale.z), __fmul_rn(v.w, scale.w)};
}

// B and C: global to shared memory, four states at a time.
template <typename RowT>
__device__ inline void load_state_rows(const SelectiveScanParams& p, const TilePlace& place, const ScanScales& scales,
                                     const Tile<RowT>& tile) {
  constexpr int32_t kVectors = kStates / 4;
  const int32_t vector = place.thread % kVectors, n = vector * 4;
  const float4 B_scale = four_of(scales.B + n);
  const bool B_by_vectors = (place.vectors & kVectorB) != 0, C_by_vectors = (place.vectors & kVectorC) != 0;
  for (int32_t t = place.thread / kVectors; t < place.groups * kGroup; t += kTileChannels / kVectors) {
    const bool exists = t < place.tokens;
    const int64_t token = place.token + (exists ? t : 0);
    const int64_t B_offset = place.batch * p.B_stride_batch + token * p.B_stride_token + n;
    const int64_t C_offset = place.batch * p.C_stride_batch + token * p.C_stride_token + n;
    float4 B = {0.0f, 0.0f, 0.0f, 0.0f};
    if (exists) B = scaled(load_states(p.B, p.B_dtype, B_offset, B_by_vectors), B_scale);
    tile.B[t].four[vector] = B;
    if constexpr (std::is_same_v<RowT, FloatRow>) {
      float4 C = {0.0f, 0.0f, 0.0f, 0.0f};
      if (exists) C = scaled(load_states(p.C, p.C_dtype, C_offset, C_by_vectors), four_of(scales.C + n));
      tile.C[t].four[vector] = C;
    } else {
      const Square square{exists ? 1 : 0, 4, false};
      const int8_t* C = static_cast<const int8_t*>(p.C) + C_offset;
      uint32_t word = 0;
      if (exists && C_by_vectors) {
        word = __ldca(reinterpret_cast<const uint32_t*>(C));
      } else {
        word = load_byte_square(C, 0, square).x;
      }
      reinterpret_cast<uint32_t*>(tile.C + t)[vector] = word;
    }
  }
}

// y, through the gate: shared to global memory.
template <typename RowT>
__device__ inline void store_channels(const SelectiveScanParams& p, const TilePlace& place, const ScanScales& scales,
                                     const Tile<RowT>& tile) {
  const ThreadColumn column(place);
  if (column.channels <= 0) return;
  const int64_t c = place.c + column.c;
  const float4 z_scale = four_of(scales.z + column.c), gate_scale = four_of(scales.gate + column.c);
  const Gate gate[4] = {{z_scale.x, gate_scale.x},
                        {z_scale.y, gate_scale.y},
                        {z_scale.z, gate_scale.z},
                        {z_scale.w, gate_scale.w}};
  const int64_t token = place.token + column.group * kGroup;
  const int64_t y_stride = p.reverse ? -p.dim : p.dim;
  int64_t z_offset = place.batch * p.z_stride_batch + token * p.z_stride_token + c;
  int64_t y_offset = (place.batch * p.seqlen + (p.reverse ? p.seqlen - 1 : 0)) * p.dim + token * y_stride + c;
  for (int32_t g = column.group; g * kGroup < place.tokens; g += kGroupsAtOnce) {
    float y[4][4];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const float4 four = tile.steps[g * kTileChannels + slot_of(column.c + i)];
      y[0][i] = four.x;
      y[1][i] = four.y;
      y[2][i] = four.z;
      y[3][i] = four.w;
    }
    if (p.z != nullptr) {
      float z[4][4];
      const Square square = column.square(place, g, kVectorZ);
      if (p.z_dtype == DType::kI8) {
        load_square<int8_t>(p.z, z_offset, p.z_stride_token, square, 0.0f, z);
      } else {
        load_float_square(p.z, p.z_dtype, z_offset, p.z_stride_token, square, 0.0f, z);
      }
#pragma unroll
      for (int32_t t = 0; t < 4; ++t) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) y[t][i] = gate[i].apply(y[t][i], z[t][i]);
      }
    }
    store_float_square(p.y, p.y_dtype, y_offset, y_stride, column.square(place, g, kVectorY), y);
    z_offset += kGroupsAtOnce * kGroup * p.z_stride_token;
    y_offset += kGroupsAtOnce * kGroup * y_stride;
  }
}

}  // namespace mambaquant::cuda
