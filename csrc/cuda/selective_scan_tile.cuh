// selective_scan: a piece of the sequence in shared memory, and its way in and out.
//
// A tile is 64 channels by some groups of four tokens, worked on by 64 threads. Moved in and out, a thread
// takes squares of four tokens by four channels; scanned, it takes a channel, four tokens to a word:
//   steps[slot(c)][token]  softplus(dt), later y before the gate;  slot(c) = c ^ (c / 8 % 4), so that eight
//                          threads meet all banks, whichever way they go
//   x[c][token]            int8, signs flipped
//   B[token][state]        float32;  C[token][state] float32, or int8 for the int8 read-outs
//   token[token]           on a routed walk: where in storage each is
// Tokens beyond the end have step 0 and B = 0, which leave the state as it is.
#pragma once

#include <type_traits>

#include "cuda/selective_scan_square.cuh"

namespace mambaquant::cuda {

inline constexpr int32_t kTileChannels = 64;
inline constexpr int32_t kMaxTileTokens = 64;
inline constexpr int32_t kGroupsAtOnce = 4;  // that 64 threads move at a time, by squares

// Operands whose rows may be read by vectors of four elements.
enum VectorOperand : uint32_t {
  kVectorX = 1,
  kVectorDt = 2,
  kVectorZ = 4,
  kVectorY = 8,
  kVectorB = 16,
  kVectorC = 32,
  kVectorAddend = 64
};

// Four tokens of a tile. kRouted: the walk has an order or an addend.
template <typename RowT, bool kRouted>
struct TileGroup {
  float4 steps[kTileChannels];
  uint32_t x[kTileChannels];
  FloatRow B[kGroup];
  RowT C[kGroup];
};
template <typename RowT>
struct TileGroup<RowT, true> : TileGroup<RowT, false> {
  alignas(16) int32_t token[kGroup];  // in storage, or kNoToken
};

// The four tokens of a channel in TileGroup::steps, in bytes from the group's start.
__device__ inline int32_t slot_of(int32_t c) {
  return (c ^ (c / 8 % 4)) * static_cast<int32_t>(sizeof(float4));
}
template <typename Group>
__device__ inline float4& steps_at(Group* group, int32_t slot) {
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

// The tokens of a tile, looked up once; `place.token` is its first step. A thread takes one.
template <typename RowT>
__device__ inline void load_tokens(const SelectiveScanParams& p, const TilePlace& place,
                                   TileGroup<RowT, true>* tile) {
  static_assert(kMaxTileTokens <= kTileChannels);
  const int32_t t = place.thread;
  if (t >= place.groups * kGroup) return;
  const int64_t token = t < place.tokens ? token_of(p, place.token + t) : kNoToken;
  tile[t / kGroup].token[t % kGroup] = static_cast<int32_t>(token);
}

// A thread's squares: one column of four channels, every fourth group, from tile to tile. The cursors of a
// routed walk stay at token 0.
template <bool kRouted>
struct ThreadColumn {
  int32_t c, group;        // c within the tile
  int32_t channels;        // of the four that exist
  bool in_full, out_full;  // the operands' vectors are whole and aligned
  Cursor x, dt, z, y, addend;

  __device__ ThreadColumn(const SelectiveScanParams& p, const TilePlace& place)
      : c(place.thread % (kTileChannels / 4) * 4),
        group(place.thread / (kTileChannels / 4)),
        channels(place.channels - c) {
    constexpr uint32_t kIn = kVectorX | kVectorDt, kOut = kVectorZ | kVectorY | kVectorAddend;
    in_full = channels >= 4 && (place.vectors & kIn) == kIn;
    out_full = channels >= 4 && (place.vectors & kOut) == kOut;
    const int64_t column = place.c + c, token = kRouted ? 0 : place.token + group * kGroup;
    x = Cursor(p.x, DType::kI8, place.batch * p.x_stride_batch + token * p.x_stride_token + column,
               p.x_stride_token);
    dt = Cursor(p.dt, p.dt_dtype,
                place.batch * p.dt_stride_batch + token * p.dt_stride_token + column,
                p.dt_stride_token);
    z = Cursor(p.z, p.z_dtype, place.batch * p.z_stride_batch + token * p.z_stride_token + column,
               p.z_stride_token);
    const bool is_turned = p.reverse && !kRouted;
    const int64_t y_row = place.batch * p.seqlen + (is_turned ? p.seqlen - 1 - token : token);
    y = Cursor(p.y, p.y_dtype, y_row * p.dim + column, is_turned ? -p.dim : p.dim);
    if constexpr (kRouted) {
      addend = Cursor(p.addend, p.addend_dtype, place.batch * p.addend_stride_batch + column,
                      p.addend_stride_token);
    }
  }

  // Four of the tokens that are left in the tile, those of `at`.
  template <typename RowT>
  __device__ auto square(const TileGroup<RowT, kRouted>* at, int32_t tokens) const {
    if constexpr (kRouted) {
      const int4 token = *reinterpret_cast<const int4*>(at->token);
      return RoutedSquare{{token.x, token.y, token.z, token.w}, channels};
    } else {
      return StridedSquare{tokens, channels};
    }
  }
  __device__ void skip(Cursor& cursor) const {
    if constexpr (!kRouted) cursor.skip(kGroupsAtOnce * kGroup);
  }
};

// Step sizes after softplus, four tokens of a channel to a vector.
template <int32_t i>
__device__ inline float4 steps_of(const float (&dt)[4][4], float bias) {
  return {softplus(dt[0][i] + bias), softplus(dt[1][i] + bias), softplus(dt[2][i] + bias),
          softplus(dt[3][i] + bias)};
}

// dt and x: global to shared memory.
template <typename RowT, bool kRouted>
__device__ inline void load_channels(const SelectiveScanParams& p, const TilePlace& place,
                                     const ScanScales& scales, TileGroup<RowT, kRouted>* tile,
                                     ThreadColumn<kRouted>& column) {
  const float4 bias = four_of(scales.dt_bias + column.c);
  const int32_t slots[4] = {slot_of(column.c), slot_of(column.c + 1), slot_of(column.c + 2),
                            slot_of(column.c + 3)};
  TileGroup<RowT, kRouted>* group = tile + column.group;
  const TileGroup<RowT, kRouted>* end = tile + place.groups;
  int32_t tokens = place.tokens - column.group * kGroup;
  for (; group < end; group += kGroupsAtOnce) {
    float dt[4][4];
    uint4 words;
    const auto square = column.square(group, tokens);
    if (column.in_full && square.has_all_tokens()) {
      load_full(square.rows(column.dt), p.dt_dtype, dt);
      words = load_full_bytes(square.rows(column.x));
    } else {
      load_part(column.dt, p.dt_dtype, square, kNoStep, dt);
      words = load_part_bytes(column.x, square);
    }
    words = transposed_bytes(words);
    *reinterpret_cast<uint4*>(group->x + column.c) = {words.x ^ kFlipSigns, words.y ^ kFlipSigns,
                                                      words.z ^ kFlipSigns, words.w ^ kFlipSigns};
    steps_at(group, slots[0]) = steps_of<0>(dt, bias.x);
    steps_at(group, slots[1]) = steps_of<1>(dt, bias.y);
    steps_at(group, slots[2]) = steps_of<2>(dt, bias.z);
    steps_at(group, slots[3]) = steps_of<3>(dt, bias.w);
    tokens -= kGroupsAtOnce * kGroup;
    column.skip(column.dt);
    column.skip(column.x);
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

// A thread's part of B and C: four states, every sixteenth token, from tile to tile. The cursors of a routed
// walk stay at token 0.
template <bool kRouted>
struct ThreadRows {
  static constexpr int32_t kVectors = kStates / 4;
  static constexpr int32_t kTokens = kTileChannels / kVectors;
  int32_t vector, token;
  Cursor B, C;

  __device__ ThreadRows(const SelectiveScanParams& p, const TilePlace& place)
      : vector(place.thread % kVectors), token(place.thread / kVectors) {
    const int64_t t = kRouted ? 0 : place.token + token;
    B = Cursor(p.B, p.B_dtype, place.batch * p.B_stride_batch + t * p.B_stride_token + vector * 4,
               p.B_stride_token);
    C = Cursor(p.C, p.C_dtype, place.batch * p.C_stride_batch + t * p.C_stride_token + vector * 4,
               p.C_stride_token);
  }
};

// B and C: global to shared memory.
template <typename RowT, bool kRouted>
__device__ inline void load_state_rows(const SelectiveScanParams& p, const TilePlace& place,
                                       const ScanScales& scales, TileGroup<RowT, kRouted>* tile,
                                       ThreadRows<kRouted>& rows) {
  constexpr bool kFloatC = std::is_same_v<RowT, FloatRow>;
  using PartOfC = std::conditional_t<kFloatC, float4, uint32_t>;
  constexpr int32_t kTokens = ThreadRows<kRouted>::kTokens;
  constexpr int64_t kStep = kTokens / kGroup * sizeof(TileGroup<RowT, kRouted>);
  const float4 B_scale = four_of(scales.B + rows.vector * 4),
               C_scale = four_of(scales.C + rows.vector * 4);
  const bool B_are_words = p.B_dtype == DType::kI8 && (place.vectors & kVectorB) != 0;
  const bool C_are_words = p.C_dtype == DType::kI8 && (place.vectors & kVectorC) != 0;
  TileGroup<RowT, kRouted>& group = tile[rows.token / kGroup];
  float4* B = group.B[rows.token % kGroup].four + rows.vector;
  PartOfC* C = reinterpret_cast<PartOfC*>(group.C + rows.token % kGroup) + rows.vector;
  int32_t tokens =
      place.groups * kGroup - rows.token;  // of the tile, and how many of them do not exist
  const int32_t beyond = place.groups * kGroup - place.tokens;
  const auto load = [&](const char* B_row, const char* C_row) {
    *B = load_states(B_row, p.B_dtype, B_are_words, B_scale);
    if constexpr (kFloatC) {
      *C = load_states(C_row, p.C_dtype, C_are_words, C_scale);
    } else {
      *C = load_bytes(C_row, C_are_words);
    }
  };
  const auto clear = [&] {
    *B = {0.0f, 0.0f, 0.0f, 0.0f};
    *C = PartOfC{};
  };
  const auto step = [&] {
    tokens -= kTokens;
    B += kStep / sizeof(*B);
    C += kStep / sizeof(*C);
  };
  if constexpr (kRouted) {
    const int32_t* at = group.token + rows.token % kGroup;
    for (; tokens > 0; step(), at += kStep / sizeof(*at)) {
      if (*at >= 0) {
        load(rows.B.at(*at), rows.C.at(*at));
      } else {
        clear();
      }
    }
  } else {
    for (; tokens > beyond; step()) {
      load(rows.B.row, rows.C.row);
      rows.B.skip(kTokens);
      rows.C.skip(kTokens);
    }
    for (; tokens > 0; step()) clear();
  }
}

// y += addend
template <typename Square>
__device__ inline void add_addend(const SelectiveScanParams& p, const Cursor& cursor, bool is_full,
                                  const Square& square, float (&y)[4][4]) {
  float addend[4][4];
  if (is_full) {
    load_full(square.rows(cursor), p.addend_dtype, addend);
  } else {
    load_part(cursor, p.addend_dtype, square, 0.0f, addend);
  }
#pragma unroll
  for (int32_t t = 0; t < 4; ++t) {
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) y[t][k] += addend[t][k];
  }
}

// y, through the gate: shared to global memory.
template <typename RowT, bool kRouted>
__device__ inline void store_channels(const SelectiveScanParams& p, const TilePlace& place,
                                      const ScanScales& scales, TileGroup<RowT, kRouted>* tile,
                                      ThreadColumn<kRouted>& column) {
  if (column.channels <= 0) return;
  const float4 slope = four_of(scales.gate_slope + column.c),
               inv_z = four_of(scales.inv_z + column.c);
  const Gate gate[4] = {
      {slope.x, inv_z.x}, {slope.y, inv_z.y}, {slope.z, inv_z.z}, {slope.w, inv_z.w}};
  const int32_t slots[4] = {slot_of(column.c), slot_of(column.c + 1), slot_of(column.c + 2),
                            slot_of(column.c + 3)};
  TileGroup<RowT, kRouted>* group = tile + column.group;
  for (int32_t tokens = place.tokens - column.group * kGroup; tokens > 0;
       tokens -= kGroupsAtOnce * kGroup) {
    const auto square = column.square(group, tokens);
    const bool is_full = column.out_full && square.has_all_tokens();
    float y[4][4];
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      const float4 four = steps_at(group, slots[k]);
      y[0][k] = four.x;
      y[1][k] = four.y;
      y[2][k] = four.z;
      y[3][k] = four.w;
    }
    if constexpr (kRouted) {
      if (p.addend != nullptr) add_addend(p, column.addend, is_full, square, y);
    }
    if (p.z != nullptr) {
      float z[4][4];
      if (is_full) {
        load_full(square.rows(column.z), p.z_dtype, z);
      } else {
        load_part(column.z, p.z_dtype, square, 0.0f, z);
      }
#pragma unroll
      for (int32_t t = 0; t < 4; ++t) {
#pragma unroll
        for (int32_t k = 0; k < 4; ++k) y[t][k] = gate[k].apply(y[t][k], z[t][k]);
      }
    }
    if (is_full) {
      store_full(square.rows(column.y), p.y_dtype, y);
    } else {
      store_part(column.y, p.y_dtype, square, y);
    }
    group += kGroupsAtOnce;
    column.skip(column.z);
    column.skip(column.y);
  }
}

}  // namespace mambaquant::cuda
