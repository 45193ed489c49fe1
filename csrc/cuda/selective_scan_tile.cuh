// selective_scan: a piece of the sequence in shared memory, and its way in and out.
//
// A tile is 64 channels by some groups of four tokens, worked on by 64 threads. Moved in and out, a thread
// takes squares of four tokens by four channels; scanned, it takes a channel, four tokens to a word:
//   steps[slot(c)][token]  softplus(dt), later y before the gate;  slot(c) = c ^ (c / 8 % 4), so that eight
//                          threads meet all banks, whichever way they go
//   x[c][token]            int8, signs flipped
//   B[token][state]        float32;  C[token][state] float32, or int8 for the int8 read-outs
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

// Four tokens of a tile.
template <typename RowT>
struct TileGroup {
  float4 steps[kTileChannels];
  uint32_t x[kTileChannels];
  FloatRow B[kGroup];
  RowT C[kGroup];
};

// The four tokens of a channel in TileGroup::steps, in bytes from the group's start.
__device__ inline int32_t slot_of(int32_t c) {
  return (c ^ (c / 8 % 4)) * static_cast<int32_t>(sizeof(float4));
}
template <typename RowT>
__device__ inline float4& steps_at(TileGroup<RowT>* group, int32_t slot) {
  return *reinterpret_cast<float4*>(reinterpret_cast<char*>(group) + slot);
}

// Where a tile lies.
struct TilePlace {
  int64_t batch, token, c;
  int32_t tokens;  // that exist, at most 4 * groups; 0: none
  int32_t groups;
  int32_t channels;  // that exist
  int32_t thread;    // 0 to 63
  uint32_t vectors;  // VectorOperand
};

// What the channels and states of a block need beside the tiles, in shared memory once: the threads that share a
// channel would each ask for it again. A in units of log2(e).
struct ScanScales {
  float dt_bias[kTileChannels], x_zero[kTileChannels], x_scale[kTileChannels], D[kTileChannels];
  float readout[kTileChannels], inv_readout[kTileChannels], gate_slope[kTileChannels],
      inv_z[kTileChannels];
  float B[kStates], C[kStates];
};

// By the first 64 threads of a block. A channel beyond the last has the scales of the first of the tile.
__device__ inline void load_scales(const SelectiveScanParams& p, int64_t c, int32_t thread,
                                   ScanScales* scales) {
  const InputScale input = load_input_scale(p, c);
  const Skip skip = load_skip(p, c);
  const Gate gate = load_gate(p, c);
  scales->dt_bias[thread] = load_dt_bias(p, c);
  scales->x_zero[thread] = input.zero + kByteShift;
  scales->x_scale[thread] = input.scale;
  scales->D[thread] = skip.D;
  scales->readout[thread] = skip.readout;
  scales->inv_readout[thread] = load_inv_readout_scale(p, c);
  scales->gate_slope[thread] = gate.slope;
  scales->inv_z[thread] = gate.inv_z_scale;
  if (thread < kStates) {
    scales->B[thread] = p.B_scale == nullptr ? 1.0f : p.B_scale[thread];
    scales->C[thread] = p.C_scale == nullptr ? 1.0f : *p.C_scale;
  }
}
__device__ inline float4 four_of(const float* p) { return *reinterpret_cast<const float4*>(p); }

// A thread's squares: one column of four channels, every fourth group, from tile to tile.
struct ThreadColumn {
  int32_t c, group;        // c within the tile
  int32_t channels;        // of the four that exist
  bool in_full, out_full;  // the operands' vectors are whole and aligned
  Cursor x, dt, z, y;

  __device__ ThreadColumn(const SelectiveScanParams& p, const TilePlace& place)
      : c(place.thread % (kTileChannels / 4) * 4),
        group(place.thread / (kTileChannels / 4)),
        channels(place.channels - c) {
    constexpr uint32_t kIn = kVectorX | kVectorDt, kOut = kVectorZ | kVectorY;
    in_full = channels >= 4 && (place.vectors & kIn) == kIn;
    out_full = channels >= 4 && (place.vectors & kOut) == kOut;
    const int64_t column = place.c + c, token = place.token + group * kGroup;
    x = Cursor(p.x, DType::kI8, place.batch * p.x_stride_batch + token * p.x_stride_token + column,
               p.x_stride_token);
    dt = Cursor(p.dt, p.dt_dtype,
                place.batch * p.dt_stride_batch + token * p.dt_stride_token + column,
                p.dt_stride_token);
    z = Cursor(p.z, p.z_dtype, place.batch * p.z_stride_batch + token * p.z_stride_token + column,
               p.z_stride_token);
    const int64_t y_row = place.batch * p.seqlen + (p.reverse ? p.seqlen - 1 - token : token);
    y = Cursor(p.y, p.y_dtype, y_row * p.dim + column, p.reverse ? -p.dim : p.dim);
  }
};

// Step sizes after softplus, four tokens of a channel to a vector.
template <int32_t i>
__device__ inline float4 steps_of(const float (&dt)[4][4], float bias) {
  return {softplus(dt[0][i] + bias), softplus(dt[1][i] + bias), softplus(dt[2][i] + bias),
          softplus(dt[3][i] + bias)};
}

// dt and x: global to shared memory.
template <typename RowT>
__device__ inline void load_channels(const SelectiveScanParams& p, const TilePlace& place,
                                     const ScanScales& scales, TileGroup<RowT>* tile,
                                     ThreadColumn& column) {
  const float4 bias = four_of(scales.dt_bias + column.c);
  const int32_t slots[4] = {slot_of(column.c), slot_of(column.c + 1), slot_of(column.c + 2),
                            slot_of(column.c + 3)};
  TileGroup<RowT>* group = tile + column.group;
  const TileGroup<RowT>* end = tile + place.groups;
  int32_t tokens = place.tokens - column.group * kGroup;
  for (; group < end; group += kGroupsAtOnce) {
    float dt[4][4];
    uint4 words;
    if (column.in_full && tokens >= kGroup) {
      load_full(column.dt.row, p.dt_dtype, column.dt.stride, dt);
      words = load_full_bytes(column.x.row, column.x.stride);
    } else {
      const Square square{tokens, column.channels};
      constexpr float kNoStep = -__builtin_huge_valf();  // softplus makes it 0
      load_part(column.dt.row, p.dt_dtype, column.dt.stride, square, kNoStep, dt);
      words = load_part_bytes(column.x.row, column.x.stride, square);
    }
    words = transposed_bytes(words);
    *reinterpret_cast<uint4*>(group->x + column.c) = {words.x ^ kFlipSigns, words.y ^ kFlipSigns,
                                                      words.z ^ kFlipSigns, words.w ^ kFlipSigns};
    steps_at(group, slots[0]) = steps_of<0>(dt, bias.x);
    steps_at(group, slots[1]) = steps_of<1>(dt, bias.y);
    steps_at(group, slots[2]) = steps_of<2>(dt, bias.z);
    steps_at(group, slots[3]) = steps_of<3>(dt, bias.w);
    tokens -= kGroupsAtOnce * kGroup;
    column.dt.skip(kGroupsAtOnce * kGroup);
    column.x.skip(kGroupsAtOnce * kGroup);
  }
}

// Four neighbouring states of a token of B or C, when they lie on a vector border or not.
__device__ inline float4 load_states(const char* p, DType dtype, bool are_words,
                                     const float4& scale) {
  float4 v;
  if (are_words) {
    v = Four<int8_t>::floats(__ldca(reinterpret_cast<const uint32_t*>(p)));
  } else {
    v = {load_element(p, dtype, 0), load_element(p, dtype, 1), load_element(p, dtype, 2),
         load_element(p, dtype, 3)};
  }
  return {__fmul_rn(v.x, scale.x), __fmul_rn(v.y, scale.y), __fmul_rn(v.z, scale.z),
          __fmul_rn(v.w, scale.w)};
}
__device__ inline uint32_t load_bytes(const char* p, bool are_words) {
  return are_words ? __ldca(reinterpret_cast<const uint32_t*>(p)) : load_bytes(p, 4);
}

// A thread's part of B and C: four states, every sixteenth token, from tile to tile.
struct ThreadRows {
  static constexpr int32_t kVectors = kStates / 4;
  static constexpr int32_t kTokens = kTileChannels / kVectors;
  int32_t vector, token;
  Cursor B, C;

  __device__ ThreadRows(const SelectiveScanParams& p, const TilePlace& place)
      : vector(place.thread % kVectors), token(place.thread / kVectors) {
    const int64_t t = place.token + token;
    B = Cursor(p.B, p.B_dtype, place.batch * p.B_stride_batch + t * p.B_stride_token + vector * 4,
               p.B_stride_token);
    C = Cursor(p.C, p.C_dtype, place.batch * p.C_stride_batch + t * p.C_stride_token + vector * 4,
               p.C_stride_token);
  }
};

// B and C: global to shared memory.
template <typename RowT>
__device__ inline void load_state_rows(const SelectiveScanParams& p, const TilePlace& place,
                                       const ScanScales& scales, TileGroup<RowT>* tile,
                                       ThreadRows& rows) {
  constexpr bool kFloatC = std::is_same_v<RowT, FloatRow>;
  using PartOfC = std::conditional_t<kFloatC, float4, uint32_t>;
  constexpr int64_t kGroups = ThreadRows::kTokens / kGroup;
  constexpr int64_t kStep = kGroups * sizeof(TileGroup<RowT>);
  const float4 B_scale = four_of(scales.B + rows.vector * 4),
               C_scale = four_of(scales.C + rows.vector * 4);
  const bool B_are_words = p.B_dtype == DType::kI8 && (place.vectors & kVectorB) != 0;
  const bool C_are_words = p.C_dtype == DType::kI8 && (place.vectors & kVectorC) != 0;
  TileGroup<RowT>& group = tile[rows.token / kGroup];
  float4* B = group.B[rows.token % kGroup].four + rows.vector;
  PartOfC* C = reinterpret_cast<PartOfC*>(group.C + rows.token % kGroup) + rows.vector;
  int32_t tokens =
      place.groups * kGroup - rows.token;  // of the tile, and how many of them do not exist
  const int32_t beyond = place.groups * kGroup - place.tokens;
  for (; tokens > beyond; tokens -= ThreadRows::kTokens) {
    *B = load_states(rows.B.row, p.B_dtype, B_are_words, B_scale);
    if constexpr (kFloatC) {
      *C = load_states(rows.C.row, p.C_dtype, C_are_words, C_scale);
    } else {
      *C = load_bytes(rows.C.row, C_are_words);
    }
    rows.B.skip(ThreadRows::kTokens);
    rows.C.skip(ThreadRows::kTokens);
    B += kStep / sizeof(*B);
    C += kStep / sizeof(*C);
  }
  for (; tokens > 0; tokens -= ThreadRows::kTokens) {
    *B = {0.0f, 0.0f, 0.0f, 0.0f};
    *C = PartOfC{};
    B += kStep / sizeof(*B);
    C += kStep / sizeof(*C);
  }
}

// y, through the gate: shared to global memory.
template <typename RowT>
__device__ inline void store_channels(const SelectiveScanParams& p, const TilePlace& place,
                                      const ScanScales& scales, TileGroup<RowT>* tile,
                                      ThreadColumn& column) {
  if (column.channels <= 0) return;
  const float4 slope = four_of(scales.gate_slope + column.c),
               inv_z = four_of(scales.inv_z + column.c);
  const Gate gate[4] = {
      {slope.x, inv_z.x}, {slope.y, inv_z.y}, {slope.z, inv_z.z}, {slope.w, inv_z.w}};
  const int32_t slots[4] = {slot_of(column.c), slot_of(column.c + 1), slot_of(column.c + 2),
                            slot_of(column.c + 3)};
  TileGroup<RowT>* group = tile + column.group;
  for (int32_t tokens = place.tokens - column.group * kGroup; tokens > 0;
       tokens -= kGroupsAtOnce * kGroup) {
    const bool is_full = column.out_full && tokens >= kGroup;
    const Square square{tokens, column.channels};
    float y[4][4];
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      const float4 four = steps_at(group, slots[k]);
      y[0][k] = four.x;
      y[1][k] = four.y;
      y[2][k] = four.z;
      y[3][k] = four.w;
    }
    if (p.z != nullptr) {
      float z[4][4];
      if (is_full) {
        load_full(column.z.row, p.z_dtype, column.z.stride, z);
      } else {
        load_part(column.z.row, p.z_dtype, column.z.stride, square, 0.0f, z);
      }
#pragma unroll
      for (int32_t t = 0; t < 4; ++t) {
#pragma unroll
        for (int32_t k = 0; k < 4; ++k) y[t][k] = gate[k].apply(y[t][k], z[t][k]);
      }
    }
    if (is_full) {
      store_full(const_cast<char*>(column.y.row), p.y_dtype, column.y.stride, y);
    } else {
      store_part(const_cast<char*>(column.y.row), p.y_dtype, column.y.stride, square, y);
    }
    group += kGroupsAtOnce;
    column.z.skip(kGroupsAtOnce * kGroup);
    column.y.skip(kGroupsAtOnce * kGroup);
  }
}

}  // namespace mambaquant::cuda
