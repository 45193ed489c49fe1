// The shapes of the Hadamard kernel, its tile in shared memory, and the first half of its work: rows
// from global memory, through H_{2^b}, into the tile.
#pragma once

#include <cstdint>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "mambaquant/hadamard.h"
#include "mambaquant/hadamard_base.h"

namespace mambaquant::cuda {

// A row of the tile is at most this long, 32 lanes of 32 elements.
inline constexpr int32_t kMaxRowLog = 10;
inline constexpr int32_t kMinHadamardThreads = 64;
// What one block may have on sm_86, sm_89 and sm_120.
inline constexpr int32_t kMaxSharedBytes = 99 * 1024;
// In front of the tile: a float for each warp of the block.
inline constexpr int32_t kReduceFloats = 32;

// dim = kRows * 2^b: a token is kRows rows of 2^b elements and its transform H_{kRows} (x) H_{2^b}, with
// H_{kRows} = H_{kOrder} (x) H_{2^kExtraLog}. A thread holds kColumns neighbouring columns of all rows.
// In each of kRounds rounds the tile takes a share of the rows; more than one only where they do not fit.
template <int32_t kOrderValue, int32_t kExtraLogValue, int32_t kColumnsValue,
          int32_t kMinRowLogValue, int32_t kMaxRowLogValue, int32_t kRoundsValue = 1,
          int32_t kRegisters = 128>
struct HadamardShape {
  static constexpr int32_t kOrder = kOrderValue, kExtraLog = kExtraLogValue;
  static constexpr int32_t kColumns = kColumnsValue, kRounds = kRoundsValue;
  static constexpr int32_t kMinLog = kMinRowLogValue, kMaxLog = kMaxRowLogValue;
  static constexpr int32_t kRows = kOrder << kExtraLog;
  static constexpr int32_t kColumnsLog = kColumns == 4 ? 2 : kColumns / 2;
  // Whole groups of four blocks, as the base takes them.
  static constexpr int32_t kRoundRows =
      kRounds == 1 ? kRows : (kRows / 4 + kRounds - 1) / kRounds * 4;
  static constexpr bool kOneLength = kMinLog == kMaxLog;  // then the compiler knows every address
  static constexpr int32_t kValues = kRows * kColumns;    // of a thread
  static constexpr int32_t kMaxThreads = (1 << kMaxLog) / kColumns > kMinHadamardThreads
                                             ? (1 << kMaxLog) / kColumns
                                             : kMinHadamardThreads;

  // So that a thread gets up to kRegisters of 65536. Left alone the compiler spills to reach fewer.
  static constexpr int32_t kMinBlocks = 65536 / kRegisters / kMaxThreads;

  __host__ __device__ static constexpr int32_t threads_per_token(int32_t row_log) {
    return row_log > kColumnsLog ? 1 << (row_log - kColumnsLog) : 1;
  }
  static constexpr int32_t threads(int32_t row_log) {
    return threads_per_token(row_log) > kMinHadamardThreads ? threads_per_token(row_log)
                                                            : kMinHadamardThreads;
  }
  // A token always has the block to itself.
  __host__ __device__ static constexpr bool one_token() {
    return threads_per_token(kMinLog) >= kMinHadamardThreads;
  }
  // Rows of fewer elements than a thread's columns, or of a single one.
  __host__ __device__ static constexpr bool is_tiny(int32_t row_log) {
    return row_log < kColumnsLog || row_log == 0;
  }
  static constexpr int32_t shared_bytes(int32_t row_log) {
    return 4 * (kReduceFloats + threads(row_log) * kColumns * kRoundRows);
  }

  static_assert(kColumns == 1 || kColumns == 2 || kColumns == 4);
  static_assert(kOrder == 1 || kOrder % 4 == 0);
  static_assert(kMaxLog <= kMaxRowLog && kMinLog <= kMaxLog);
  static_assert(kRounds == 1 ||
                    (threads_per_token(kMinLog) >= kMinHadamardThreads && kRows % 4 == 0),
                "only a token that has the block to itself comes in rounds");
  static_assert(kRounds == 1 || kRoundRows % (4 << kExtraLog) == 0 || kOrder == 1);
  static_assert(kMinLog > 4 || kRows == 1 || kRows / 4 % 2 == 1,
                "NOTE(short-rows) needs an odd number of groups of four rows");
  static_assert(kMaxThreads * kMinBlocks * kRegisters <= 65536 && kMinBlocks > 0);
  static_assert(kMaxThreads <= 1024 && kValues <= 96);
  static_assert(shared_bytes(kMaxLog) <= kMaxSharedBytes &&
                shared_bytes(kMinLog) <= kMaxSharedBytes);
};

// What the launcher works out; the same for every block.
struct HadamardPlan {
  int32_t row_log;     // b
  int32_t tokens_log;  // of the tokens of a block
  float norm;          // 1 / sqrt(dim)
  bool is_vector;      // 16 bytes at a time can be loaded from x
};

// The tokens of one block.
struct TokenTile {
  HadamardPlan plan;
  const void* x;  // of the first token
  int64_t x_stride_token;
  DType x_dtype;
  int32_t count;  // that exist
};

__device__ inline const void* advanced(const void* x, DType dtype, int64_t elements) {
  return static_cast<const char*>(x) + elements * (dtype == DType::kF32 ? 4 : 2);
}

// NOTE(swizzle): rows of 32 elements and more lie at quad ^ swizzle(quad / 8) of 16 bytes, so that the
// eight lanes that a wavefront serves meet different banks, in a strip's stores (two or four lanes a row,
// rows 8, 16 or 32 quads apart, or eight lanes two quads apart) as in a column's loads (eight neighbours).
// Linear: the position of a sum without carries is the xor of the positions.
__device__ inline int32_t swizzled_quad(int32_t quad) {
  return quad ^ ((quad >> 3 & 1) * 5) ^ (quad >> 2 & 4) ^ ((quad >> 5 & 1) * 7);
}

// NOTE(short-rows): rows of 2 to 16 elements keep their order but for the four rows of a group, which
// lie at row ^ mix. The rows of a token are 4 * odd in number: the threads of a wavefront, from several
// tokens, meet different banks at the same row of each because mix differs where the banks would not.
__device__ inline int32_t short_row_mix(int32_t token, int32_t row_log) {
  return token >> (row_log < 3 ? 3 - row_log : 0) & 3;
}

// One stage of Sylvester's transform, between registers kStride apart.
template <int32_t kCount, int32_t kStride>
__device__ inline void butterfly_stage(float* v) {
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) {
    if ((i & kStride) != 0) continue;
    const float a = v[i], b = v[i + kStride];
    v[i] = a + b;
    v[i + kStride] = a - b;
  }
}

template <int32_t kCount, int32_t kStride = 1>
__device__ inline void butterflies(float* v) {
  if constexpr (kStride < kCount) {
    butterfly_stage<kCount, kStride>(v);
    butterflies<kCount, 2 * kStride>(v);
  }
}

// The stages among `team` neighbouring lanes.
template <int32_t kCount>
__device__ inline void lane_butterflies(float* v, int32_t team) {
#pragma unroll 1
  for (int32_t mask = 1; mask < team; mask *= 2) {
    const float sign = (threadIdx.x & mask) == 0 ? 1.0f : -1.0f;
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) {
      v[i] = fmaf(v[i], sign, __shfl_xor_sync(kFullMask, v[i], mask));
    }
  }
}

// A strip is kCount elements of a row, as vectors of 16 bytes: vector i of member l of the row's team is
// vector i * team + l of the row. Its first elements are then `first`, its registers' elements in order.
template <typename T, int32_t kCount>
__device__ inline void load_strip(const T* row, int32_t team, int32_t member, bool is_vector,
                                  float* v) {
  constexpr int32_t kVec = kVecWidth<T>, kVectors = kCount / kVec;
  const T* first = row + member * kVec;
  const int32_t stride = team * kVec;
  if (is_vector) {
    Vec<T, kVec> in[kVectors];
#pragma unroll
    for (int32_t i = 0; i < kVectors; ++i) in[i] = load_vec<kVec>(first + i * stride);
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) v[i] = to_float(in[i / kVec][i % kVec]);
  } else {
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) v[i] = to_float(first[i / kVec * stride + i % kVec]);
  }
}

// As above, by the dtype of x; zeros for a token that does not exist.
template <int32_t kCount>
__device__ inline void load_strip(const TokenTile& tokens, int32_t token, int64_t column,
                                  int32_t team, int32_t member, float* v) {
  const int64_t start = token * tokens.x_stride_token + column;
  const bool is_vector = tokens.plan.is_vector;
  if (token >= tokens.count) {
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) v[i] = 0.0f;
  } else if (tokens.x_dtype == DType::kF32) {
    load_strip<float, kCount>(static_cast<const float*>(tokens.x) + start, team, member, is_vector,
                              v);
  } else if (tokens.x_dtype == DType::kF16) {
    load_strip<__half, kCount>(static_cast<const __half*>(tokens.x) + start, team, member,
                               is_vector, v);
  } else {
    load_strip<__nv_bfloat16, kCount>(static_cast<const __nv_bfloat16*>(tokens.x) + start, team,
                                      member, is_vector, v);
  }
}

__device__ inline float load_element(const TokenTile& tokens, int32_t token, int32_t column) {
  const int64_t index = token * tokens.x_stride_token + column;
  if (token >= tokens.count) return 0.0f;
  if (tokens.x_dtype == DType::kF32) return static_cast<const float*>(tokens.x)[index];
  if (tokens.x_dtype == DType::kF16) return to_float(static_cast<const __half*>(tokens.x)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(tokens.x)[index]);
}

// Rows of 8 * kUnits elements and more, kTileRows of each token from first_row on.
template <int32_t kTileRows, int32_t kUnits>
__device__ inline void transform_long_rows(const TokenTile& tokens, int32_t first_row,
                                           float* tile) {
  constexpr int32_t kCount = 8 * kUnits, kStripLog = kUnits == 4 ? 5 : 3;
  const int32_t row_log = tokens.plan.row_log, team_log = row_log - kStripLog;
  const int32_t team = 1 << team_log;
  const int32_t strips = kTileRows << (tokens.plan.tokens_log + team_log);
  // Where the quads of a strip lie: those of bits 0, 1 and 2 of a quad's number.
  const bool is_half = tokens.x_dtype != DType::kF32;
  const int32_t step[3] = {is_half ? 1 : swizzled_quad(team), swizzled_quad(2 * team),
                           swizzled_quad(4 * team)};
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x) - lane; i < strips; i += blockDim.x) {
    const int32_t strip = i + lane, row = strip >> team_log, member = strip & (team - 1);
    const int32_t token = row / kTileRows;
    float v[kCount];
    const int32_t source_row = first_row + row - token * kTileRows;
    load_strip<kCount>(tokens, token, source_row << row_log, team, member, v);
    butterflies<kCount>(v);
    lane_butterflies<kCount>(v, team);
    if (strip >= strips) continue;
    const int32_t first = swizzled_quad((row << (row_log - 2)) + (is_half ? 2 * member : member));
#pragma unroll
    for (int32_t c = 0; c < kCount / 4; ++c) {
      const int32_t quad = first ^ ((c & 1) != 0 ? step[0] : 0) ^ ((c & 2) != 0 ? step[1] : 0) ^
                           ((c & 4) != 0 ? step[2] : 0);
      store_vec(tile + 4 * quad, Vec<float, 4>{v[4 * c], v[4 * c + 1], v[4 * c + 2], v[4 * c + 3]});
    }
  }
}

// v[2 i], v[2 i + 1] <- v[2 (i ^ mask)], v[2 (i ^ mask) + 1], for i < 4.
__device__ inline void permute_pairs(float* v, int32_t mask) {
#pragma unroll
  for (int32_t bit = 1; bit < 4; bit *= 2) {
    const bool swaps = (mask & bit) != 0;
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) {
      if ((i / 2 & bit) != 0) continue;
      const float a = v[i], b = v[i + 2 * bit];
      v[i] = swaps ? b : a;
      v[i + 2 * bit] = swaps ? a : b;
    }
  }
}

// Rows of 2 to 16 elements: a thread takes 8 neighbouring elements. It stores them as four pairs, not
// all threads in the same order, since pair i of 16 neighbouring threads would be on four banks.
template <int32_t kTileRows>
__device__ inline void transform_short_rows(const TokenTile& tokens, float* tile) {
  const int32_t row_log = tokens.plan.row_log;
  const int32_t units = kTileRows << (tokens.plan.tokens_log + row_log) >> 3;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x) - lane; i < units; i += blockDim.x) {
    const int32_t unit = i + lane, token = (8 * unit >> row_log) / kTileRows;
    float v[8];
    load_strip<8>(tokens, token, 8 * unit - (token * kTileRows << row_log), 1, 0, v);
    butterfly_stage<8, 1>(v);
    if (row_log >= 2) butterfly_stage<8, 2>(v);
    if (row_log >= 3) butterfly_stage<8, 4>(v);
    lane_butterflies<8>(v, row_log == 4 ? 2 : 1);
    if (unit >= units) continue;
    const int32_t moved = short_row_mix(token, row_log) << row_log;  // NOTE(short-rows)
    const int32_t order = unit >> 2 & 3;
    permute_pairs(v, order ^ (moved & 7) >> 1);
    float* destination = tile + (8 * unit ^ (moved & ~7));
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      store_vec(destination + 2 * (k ^ order), Vec<float, 2>{v[2 * k], v[2 * k + 1]});
    }
  }
}

// Rows of 1 or 2 elements, a thread a row, padded with zeros to the kWidth columns of a thread.
template <int32_t kTileRows, int32_t kWidth>
__device__ inline void transform_tiny_rows(const TokenTile& tokens, float* tile) {
  const int32_t length = 1 << tokens.plan.row_log;
#pragma unroll 1
  for (int32_t row = threadIdx.x; row < kTileRows << tokens.plan.tokens_log; row += blockDim.x) {
    const int32_t token = row / kTileRows, column = (row - token * kTileRows) * length;
    const float a = load_element(tokens, token, column);
    const float b = length == 2 ? load_element(tokens, token, column + 1) : 0.0f;
    float* destination = tile + row * kWidth;
    destination[0] = a + b;
#pragma unroll
    for (int32_t c = 1; c < kWidth; ++c) destination[c] = c < length ? a - b : 0.0f;
  }
}

// The rows from first_row on, kTileRows of each token, into the tile.
template <typename Shape, int32_t kTileRows>
__device__ inline void transform_rows(const TokenTile& tokens, int32_t first_row, float* tile) {
  const int32_t row_log = tokens.plan.row_log;
  if constexpr (Shape::kMaxLog >= 6) {
    if (row_log >= 6) return transform_long_rows<kTileRows, 4>(tokens, first_row, tile);
  }
  if constexpr (Shape::kMinLog <= 5 && Shape::kMaxLog >= 5) {
    if (row_log == 5) return transform_long_rows<kTileRows, 1>(tokens, first_row, tile);
  }
  if constexpr (Shape::kMinLog <= 4) {
    if (!Shape::is_tiny(row_log)) return transform_short_rows<kTileRows>(tokens, tile);
    transform_tiny_rows<kTileRows, Shape::kColumns>(tokens, tile);
  }
}

}  // namespace mambaquant::cuda
