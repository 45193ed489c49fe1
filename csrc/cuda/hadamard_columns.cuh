// The second half of the Hadamard kernel: a thread's columns from the tile, and H_{kRows} across the rows.
#pragma once

#include "cuda/hadamard_rows.cuh"

namespace mambaquant::cuda {

// The columns of one thread.
template <typename Shape>
struct ColumnPlace {
  int32_t token;   // of the block
  int32_t column;  // the first of kColumns

  __device__ explicit ColumnPlace(int32_t row_log) {
    const int32_t log = row_log > Shape::kColumnsLog ? row_log - Shape::kColumnsLog : 0;
    token = Shape::one_token() ? 0 : static_cast<int32_t>(threadIdx.x) >> log;
    column = (static_cast<int32_t>(threadIdx.x) & ((1 << log) - 1)) * Shape::kColumns;
  }
};

// Where the columns of one thread lie in the tile: those of row r of the tile at
//   (offset[r % 4] ^ (r / 4 odd ? odd_group : 0)) + r / 4 * group_stride.
template <typename Shape>
struct ColumnReader {
  const float* tile;
  int32_t offset[4];
  int32_t odd_group, group_stride;

  __device__ ColumnReader(const float* tile_start, const ColumnPlace<Shape>& place, int32_t row_log)
      : tile(tile_start) {
    const bool is_long = row_log >= 5;
    const int32_t width_log = row_log > Shape::kColumnsLog ? row_log : Shape::kColumnsLog;
    const int32_t first = place.token * Shape::kRoundRows;
    const int32_t mix = is_long || Shape::kRows == 1 || Shape::is_tiny(row_log)
                            ? 0
                            : short_row_mix(place.token, row_log);
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) {
      const int32_t element = ((first + (k ^ mix)) << width_log) + place.column;
      offset[k] = is_long ? swizzled_quad(element >> 2) << 2 | (element & 3) : element;
    }
    // NOTE(swizzle): a step of four rows of 32 flips bit 2 of quad / 8, of longer ones no bit that counts.
    odd_group = row_log == 5 ? 7 * 4 : 0;
    group_stride = 4 << width_log;
  }

  template <int32_t kRow>
  __device__ void load(float* v) const {
    constexpr int32_t kGroup = kRow / 4;
    const int32_t at =
        (kGroup % 2 == 0 ? offset[kRow % 4] : offset[kRow % 4] ^ odd_group) + kGroup * group_stride;
    const Vec<float, Shape::kColumns> in = load_vec<Shape::kColumns>(tile + at);
#pragma unroll
    for (int32_t c = 0; c < Shape::kColumns; ++c) v[c] = in[c];
  }
};

// Index of a base in kHadamardBases.
consteval int32_t index_of_base(int64_t order) {
  for (int32_t i = 0;; ++i) {
    if (kHadamardBases[i].order == order) return i;
  }
}

// H_m^T = H_m, or H_m^T = 2 I - H_m: the code of x H_m serves x H_m^T too, for a second look at the tile.
consteval bool is_symmetric_base(int64_t order) {
  const HadamardBase& base = kHadamardBases[index_of_base(order)];
  for (int64_t r = 0; r < order; ++r) {
    if (base.forward[r] != base.inverse[r]) return false;
  }
  return true;
}
consteval bool is_skew_base(int64_t order) {
  const HadamardBase& base = kHadamardBases[index_of_base(order)];
  for (int64_t r = 0; r < order; ++r) {
    const uint64_t off_diagonal = ((uint64_t{1} << order) - 1) & ~(uint64_t{1} << r);
    if ((base.forward[r] ^ base.inverse[r]) != off_diagonal) return false;
    if ((base.forward[r] >> r & 1) != 0) return false;
  }
  return true;
}

// Adds blocks a, b, c and d = 4 * kGroup + 0 .. 3 to every block of x H_m in one column. Bit 0, 1, 2 of s
// negates a, b, c in sums[s] = +-a +-b +-c + d; a sum with -d is subtracted, as its complement. The signs
// are known to the compiler: 10 additions for the sums, and one for each of the kOrder blocks.
template <int32_t kOrder, int32_t kGroup, int32_t kStride>
__device__ inline void add_group(float a, float b, float c, float d, float* acc) {
  constexpr HadamardBase kBase = kHadamardBases[index_of_base(kOrder)];
  const float low[4] = {a + b, b - a, a - b, -(a + b)};
  const float high[2] = {c + d, d - c};
  float sums[8];
#pragma unroll
  for (int32_t s = 0; s < 8; ++s) sums[s] = low[s % 4] + high[s / 4];
#pragma unroll
  for (int32_t r = 0; r < kOrder; ++r) {
    const auto code = static_cast<int32_t>(kBase.forward[r] >> (4 * kGroup) & 15u);
    const float sum = code < 8 ? sums[code] : -sums[15 - code];
    acc[r * kStride] = kGroup == 0 ? sum : acc[r * kStride] + sum;
  }
}

// Rows kFirst .. kEnd - 1 from the tile, whose first row is kFirst. acc[row][column] holds x H_m of the
// blocks so far, or the rows themselves where there is no base.
template <typename Shape, int32_t kFirst, int32_t kEnd, int32_t kRow = kFirst>
__device__ inline void take_rows(const ColumnReader<Shape>& reader, float* acc) {
  constexpr int32_t kColumns = Shape::kColumns, kBlockRows = 1 << Shape::kExtraLog;
  if constexpr (kRow >= kEnd) {
    return;
  } else if constexpr (Shape::kOrder == 1) {
    reader.template load<kRow - kFirst>(acc + kRow * kColumns);
    take_rows<Shape, kFirst, kEnd, kRow + 1>(reader, acc);
  } else {
    // Row h of blocks 4 g .. 4 g + 3.
    constexpr int32_t kGroup = kRow / kBlockRows / 4, kHigh = kRow % kBlockRows;
    constexpr int32_t kLocal = kRow - kFirst;
    float in[4][kColumns];
    __syncwarp();  // or the compiler moves later groups' loads up, and spills
    reader.template load<kLocal>(in[0]);
    reader.template load<kLocal + kBlockRows>(in[1]);
    reader.template load<kLocal + 2 * kBlockRows>(in[2]);
    reader.template load<kLocal + 3 * kBlockRows>(in[3]);
#pragma unroll
    for (int32_t c = 0; c < kColumns; ++c) {
      add_group<Shape::kOrder, kGroup, kBlockRows * kColumns>(in[0][c], in[1][c], in[2][c],
                                                              in[3][c], acc + kHigh * kColumns + c);
    }
    constexpr int32_t kNext = kHigh + 1 < kBlockRows ? kRow + 1 : kRow + 1 + 3 * kBlockRows;
    take_rows<Shape, kFirst, kEnd, kNext>(reader, acc);
  }
}

// Whether x H^T is made from x H.
template <typename Shape>
inline constexpr bool kHasSkewBase = Shape::kOrder > 1 && !is_symmetric_base(Shape::kOrder);

// acc - 2 x for rows kFirst .. kEnd - 1, of which x is still in the tile.
template <typename Shape, int32_t kFirst, int32_t kEnd, int32_t kRow = kFirst>
__device__ inline void subtract_rows_twice(const ColumnReader<Shape>& reader, float* acc) {
  static_assert(is_skew_base(Shape::kOrder));
  if constexpr (kRow < kEnd) {
    float in[Shape::kColumns];
    if (kRow % 4 == 0) __syncwarp();  // as in take_rows
    reader.template load<kRow - kFirst>(in);
#pragma unroll
    for (int32_t c = 0; c < Shape::kColumns; ++c) {
      float* target = acc + kRow * Shape::kColumns + c;
      *target = fmaf(-2.0f, in[c], *target);
    }
    subtract_rows_twice<Shape, kFirst, kEnd, kRow + 1>(reader, acc);
  }
}

// What remains of H_{kRows} once every row is in acc.
template <typename Shape>
__device__ inline void finish_columns(bool is_transposed, float* acc) {
  constexpr int32_t kColumns = Shape::kColumns;
  if constexpr (Shape::kExtraLog > 0) {
    constexpr int32_t kBlock = kColumns << Shape::kExtraLog;
#pragma unroll
    for (int32_t first = 0; first < Shape::kValues; first += kBlock) {
      butterflies<kBlock, kColumns>(acc + first);
    }
  }
  if constexpr (kHasSkewBase<Shape>) {
    if (is_transposed) {  // 2 x - x H_m, as a negated difference
#pragma unroll
      for (int32_t i = 0; i < Shape::kValues; ++i) acc[i] = 0.0f - acc[i];
    }
  }
}

}  // namespace mambaquant::cuda
