// pack_gemm_weight, gemm, gemm_dequantize, gemm_requantize. Formulas: mambaquant/gemm.h; the inner
// loop of each ISA: gemm_micro.h.
//
// The activations are repacked once into tiles of kTileRows rows (one byte read and one written per
// element, 1/N of the work), so that the inner loop walks two streams with constant offsets
// whatever the row stride. Then a task is one panel of kTileColumns weight columns times a block of
// row tiles: the block stays in L2 while panels pass, the panel stays in L1 or L2 while tiles pass.
// A tile's accumulators go through a 1.5 KB stack tile to the epilogue, which is written in the Vec
// vocabulary; the int32 matrix never exists.
//
// Bound: arithmetic for many rows (2*M*N*K operations; AVX-512 VNNI: 256 per cycle and core). For
// few rows (decode) bytes: every weight is read once, N*K bytes, in address order, panels split
// among the threads. Measured on a shared Xeon, best of repeated runs: K >= 768, 470 to 690 Gop/s
// on one core, where torch._int_mm without epilogue reaches 490 to 650; M = 1, N*K = 16 MB, cold,
// two cores: median 24 GB/s, where a plain sum of the bytes reads 21.
#include "mambaquant/gemm.h"

#include <cstring>

#include "cpu/gemm_micro.h"
#include "cpu/kernels.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

static_assert(kGemmColumnMultiple % kTileColumns == 0);

constexpr int64_t kBlocksPerThread = 8;  // tasks that an even split among threads needs
// Where all the weights fit L2 too, blocks are small: successive panels then write neighbouring
// lines of few rows, instead of a line in each of many rows (K = 48: a quarter faster).
constexpr int64_t kTilesPerSmallBlock = 4, kSmallWeightBytes = 512 * 1024;
constexpr int64_t kPackGrainBytes = 65536;
// What a thread must have to do before it is worth waking: cycles, by a coarse count of products
// and bytes.
constexpr int64_t kThreadCycles = 10000, kProductsPerCycle = 128, kWeightBytesPerCycle = 8;

int64_t padded_depth(int64_t k) { return round_up(k, kGemmCpuDepthMultiple); }

using TileProduct = void (*)(const RowT*, const int32_t*, const int8_t*, int64_t, int32_t*);

// A tile whose second vector of columns lies outside the matrix leaves it out.
template <int64_t kRows>
TileProduct tile_product_for(int64_t rows, int64_t columns) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_product_for<kRows - 1>(rows, columns);
  }
  return columns * kTileVectors <= kTileColumns ? &tile_product<kRows, 1>
                                                : &tile_product<kRows, kTileVectors>;
}

// How the work is cut: row tiles into blocks that fit L2, columns into panels; a task is a block
// times a panel, block after block, and each thread slot has one run of tasks. Cuts are even: 13
// rows are tiles of 6 and 7.
struct Plan {
  int64_t rows, padded_k, tiles, panels, blocks, slots;

  Plan(const GemmOperands& p, const Threads& threads)
      : rows(p.m),
        padded_k(padded_depth(p.k)),
        tiles((p.m + kTileRows - 1) / kTileRows),
        panels((p.n + kTileColumns - 1) / kTileColumns) {
    const int64_t for_cache = (p.m * padded_k + kGemmBlockBytes - 1) / kGemmBlockBytes;
    const int64_t for_balance = kBlocksPerThread * threads.num_threads / (panels + 1);
    blocks = for_cache > for_balance ? for_cache : for_balance;
    if (panels * kTileColumns * padded_k <= kSmallWeightBytes &&
        blocks < tiles / kTilesPerSmallBlock) {
      blocks = tiles / kTilesPerSmallBlock;
    }
    blocks = blocks < tiles ? blocks : tiles;
    blocks = blocks > 0 ? blocks : 1;
    const int64_t weights = panels * kTileColumns * (padded_k + 1);
    const int64_t cycles = rows * weights / kProductsPerCycle + weights / kWeightBytesPerCycle;
    const int64_t useful = cycles * threads.grain_divisor / kThreadCycles + 1;
    slots = useful < threads.num_threads ? useful : threads.num_threads;
    slots = slots < tasks() ? slots : tasks();
  }

  int64_t tasks() const { return blocks * panels; }
  int64_t block_tile(int64_t block) const { return block * tiles / blocks; }
  int64_t tile_row(int64_t tile) const { return tiles > 0 ? tile * rows / tiles : 0; }
};

// A block of activations as the inner loop reads it.
struct PackedBlock {
  int64_t first_row;
  int32_t* start;  // where each row's accumulators start
  RowT* rows;      // row tile after row tile
};

PackedBlock pack_block(const GemmOperands& p, const Plan& plan, int64_t block, int8_t* scratch) {
  const int64_t first_row = plan.tile_row(plan.block_tile(block));
  const int64_t block_rows = plan.tile_row(plan.block_tile(block + 1)) - first_row;
  const PackedBlock packed{first_row, reinterpret_cast<int32_t*>(scratch),
                           reinterpret_cast<RowT*>(scratch + round_up(block_rows * 4, 64))};
  for (int64_t t = plan.block_tile(block); t < plan.block_tile(block + 1); ++t) {
    const int64_t row = plan.tile_row(t);
    pack_row_tile({p.a + row * p.a_stride_row, p.a_stride_row, plan.tile_row(t + 1) - row, p.k},
                  packed.rows + (row - first_row) * plan.padded_k, packed.start + row - first_row);
  }
  return packed;
}

// Finished accumulators, kTileColumns a row, and their place in the (M, N) result.
struct Tile {
  const int32_t* acc;
  int64_t row, rows, column, columns;
};

// One block times one panel.
template <typename Epilogue>
void run_task(const GemmOperands& p, const Plan& plan, const PackedBlock& packed, int64_t task,
              const Epilogue& epilogue) {
  const int64_t block = task / plan.panels;
  const int64_t column = task % plan.panels * kTileColumns;
  const int64_t columns = p.n - column < kTileColumns ? p.n - column : kTileColumns;
  const int8_t* panel = p.packed + column * plan.padded_k;
  const int64_t first = plan.block_tile(block), last = plan.block_tile(block + 1);
  int64_t next_row = plan.tile_row(first);
  for (int64_t t = first; t < last; ++t) {
    alignas(64) int32_t acc[kTileRows * kTileColumns];
    const int64_t row = next_row;
    next_row = plan.tile_row(t + 1);
    const Tile tile{acc, row, next_row - row, column, columns};
    const int64_t packed_row = row - packed.first_row;
    tile_product_for<kTileRows>(tile.rows, columns)(packed.rows + packed_row * plan.padded_k,
                                                    packed.start + packed_row, panel, plan.padded_k,
                                                    acc);
    epilogue(tile);
  }
}

// Calls epilogue(Tile) for every tile of the (M, N) result, from several threads.
template <typename Epilogue>
void for_each_tile(const GemmOperands& p, const Threads& threads, const Epilogue& epilogue) {
  const Plan plan(p, threads);
  const int64_t scratch_bytes = gemm_scratch_bytes(p.m, p.k);
  threads.parallel_for(plan.slots, 1, [&](int64_t begin, int64_t end) {
    alignas(64) int8_t stack[kGemmStackBytes];
    for (int64_t slot = begin; slot < end; ++slot) {
      int8_t* scratch =
          scratch_bytes <= kGemmStackBytes ? stack : p.workspace + slot * scratch_bytes;
      PackedBlock packed{};
      const int64_t first = slot * plan.tasks() / plan.slots;
      const int64_t last = (slot + 1) * plan.tasks() / plan.slots;
      for (int64_t task = first; task < last; ++task) {
        const bool enters_block = task == first || task % plan.panels == 0;
        if (enters_block) packed = pack_block(p, plan, task / plan.panels, scratch);
        run_task(p, plan, packed, task, epilogue);
      }
    }
  });
}

// Full vectors take the plain load and store: the partial ones of AVX2 go through memory.
template <typename T>
F32 load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <typename T>
void store_some(T* p, F32 x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store(p, x, n);
  }
}

F32 load_any_float(const void* p, DType dtype, int64_t index, int64_t n) {
  if (dtype == DType::kF32) return load_some(static_cast<const float*>(p) + index, n);
  if (dtype == DType::kF16) return load_some(static_cast<const Float16*>(p) + index, n);
  return load_some(static_cast<const BFloat16*>(p) + index, n);
}

// A full tile without bias and offset, the usual case, on its own: with a small K the epilogue is a
// quarter of the work. Row by row, so that a row's vectors are stored side by side.
template <typename Begin, typename Store>
void for_each_plain_value(const GemmScales s, const Tile tile, const Begin& begin_columns,
                          const Store& store_vector) {
  constexpr int64_t kVectors = kTileColumns / kLanes;  // the scalar ISA's lanes are single
  F32 b_scale[kVectors], static_scale[kVectors];
  decltype(begin_columns(0, 0)) columns[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    b_scale[v] = load(s.b_scale + tile.column + v * kLanes);
    static_scale[v] = set1(s.a_scale[0]) * b_scale[v];  // unused with one per token
    columns[v] = begin_columns(tile.column + v * kLanes, kLanes);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r;
    for (int64_t v = 0; v < kVectors; ++v) {
      const F32 scale =
          s.a_scale_is_per_token ? set1(s.a_scale[row]) * b_scale[v] : static_scale[v];
      const I32 acc = load_i32(tile.acc + r * kTileColumns + v * kLanes);
      store_vector(row, tile.column + v * kLanes, kLanes, to_f32(acc) * scale, columns[v]);
    }
  }
}

// Calls store_vector(row, column, lanes, value, columns) for a tile; value without residual,
// columns what begin_columns(column, lanes) gave. Arguments by value here and locals below: the
// stores could alias the params.
template <typename Begin, typename Store>
void for_each_value(const GemmScales s, const Tile tile, const Begin& begin_columns,
                    const Store& store_vector) {
  if (s.bias == nullptr && s.acc_offset == nullptr && tile.columns == kTileColumns) {
    for_each_plain_value(s, tile, begin_columns, store_vector);
    return;
  }
  for (int64_t c = 0; c < tile.columns; c += kLanes) {
    const int64_t n = tile.columns - c < kLanes ? tile.columns - c : kLanes;
    const int64_t column = tile.column + c;
    const F32 b_scale = load_some(s.b_scale + column, n);
    const F32 static_scale = set1(s.a_scale[0]) * b_scale;
    // x + -0 is x, for x = -0 too, which x + 0 is not.
    const F32 bias = s.bias == nullptr ? set1(-0.0f) : load_some(s.bias + column, n);
    const I32 offset = s.acc_offset == nullptr ? set1_i32(0) : load_i32(s.acc_offset + column, n);
    const auto columns = begin_columns(column, n);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const F32 scale = s.a_scale_is_per_token ? set1(s.a_scale[row]) * b_scale : static_scale;
      const I32 acc = load_i32(tile.acc + r * kTileColumns + c);
      store_vector(row, column, n, to_f32(acc - offset) * scale + bias, columns);
    }
  }
}

template <typename T>
Status gemm_dequantize_typed(const GemmDequantizeParams& p, const Threads& threads) {
  for_each_tile(p.operands, threads, [&](const Tile& tile) {
    T* const out = static_cast<T*>(p.out);
    const void* const residual = p.residual;
    const DType residual_dtype = p.residual_dtype;
    const int64_t out_stride = p.operands.n, residual_stride = p.residual_stride_row;
    const auto no_columns = [](int64_t, int64_t) { return 0; };
    const auto store_value = [=](int64_t row, int64_t column, int64_t n, F32 value, int) {
      if (residual != nullptr) {
        value = value + load_any_float(residual, residual_dtype, row * residual_stride + column, n);
      }
      store_some(out + row * out_stride + column, value, n);
    };
    for_each_value(p.scales, tile, no_columns, store_value);
  });
  return Status::ok();
}

// The rounding of a vector of output columns.
struct OutputGrid {
  F32 inv_scale, zero_point;
};

Status check_depth(const GemmOperands& p, const int32_t* acc_offset) {
  if (p.k > kMaxK)
    return Status::unsupported("expected K of at most 131072, beyond which int32 sums overflow");
  if (acc_offset != nullptr && p.k > kMaxKWithOffset) {
    return Status::unsupported(
        "expected K of at most 65536 with acc_offset, beyond which int32 sums overflow");
  }
  return Status::ok();
}

}  // namespace

int64_t gemm_packing_version() { return kPackingVersion; }

Status pack_gemm_weight(const PackGemmWeightParams& p, const Threads& threads) {
  if (p.k > kMaxK)
    return Status::unsupported("expected K of at most 131072, beyond which int32 sums overflow");
  const int64_t padded_k = padded_depth(p.k);
  const int64_t group = depth_group(padded_k);
  const int64_t padded_n = round_up(p.n, kGemmColumnMultiple);
  const int64_t used = padded_n * padded_k;  // of the size that all backends share
  std::memset(p.packed + used, 0, static_cast<size_t>(packed_gemm_weight_bytes(p.n, p.k) - used));
  threads.parallel_for(padded_n, kPackGrainBytes / (padded_k + 1) + 1,
                       [&](int64_t begin, int64_t end) {
                         for (int64_t n = begin; n < end; ++n) {
                           const int64_t lane = n % kTileColumns;
                           int8_t* packed = p.packed + (n - lane) * padded_k + lane * group;
                           const int8_t* row = p.weight + n * p.weight_stride_row;
                           for (int64_t k = 0; k < padded_k; ++k) {
                             const int32_t w = n < p.n && k < p.k ? row[k] : 0;
                             packed[k / group * group * kTileColumns + k % group] =
                                 static_cast<int8_t>(static_cast<uint8_t>(w + kWeightBias));
                           }
                         }
                       });
  return Status::ok();
}

Status gemm(const GemmParams& p, const Threads& threads) {
  const Status depth = check_depth(p.operands, nullptr);
  if (!depth.is_ok()) return depth;
  for_each_tile(p.operands, threads, [&](const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      int32_t* out = p.acc + (tile.row + r) * p.operands.n + tile.column;
      for (int64_t c = 0; c < tile.columns; c += kLanes) {
        const int64_t n = tile.columns - c < kLanes ? tile.columns - c : kLanes;
        store_i32(out + c, load_i32(tile.acc + r * kTileColumns + c), n);
      }
    }
  });
  return Status::ok();
}

Status gemm_dequantize(const GemmDequantizeParams& p, const Threads& threads) {
  const Status depth = check_depth(p.operands, p.scales.acc_offset);
  if (!depth.is_ok()) return depth;
  return MBQ_DISPATCH_FLOAT(p.out_dtype, [&](auto tag) {
    return gemm_dequantize_typed<typename decltype(tag)::type>(p, threads);
  });
}

Status gemm_requantize(const GemmRequantizeParams& p, const Threads& threads) {
  const Status depth = check_depth(p.operands, p.scales.acc_offset);
  if (!depth.is_ok()) return depth;
  for_each_tile(p.operands, threads, [&](const Tile& tile) {
    const auto grid_of = [&](int64_t column, int64_t n) {
      // A tail's unused lanes divide by 0 and are not stored.
      OutputGrid grid{set1(1.0f) / load_some(p.out_scale + column, n), set1(0.0f)};
      if (p.out_zero_point != nullptr)
        grid.zero_point = to_f32(load_i32(p.out_zero_point + column, n));
      return grid;
    };
    int8_t* const out = p.q;
    const int64_t out_stride = p.operands.n;
    const bool is_symmetric = p.out_zero_point == nullptr;
    const auto store_rounded = [=](int64_t row, int64_t column, int64_t n, F32 value,
                                   OutputGrid grid) {
      // The store rounds.
      const F32 q = is_symmetric ? clamp_symmetric(value, grid.inv_scale)
                                 : quantize_asymmetric(value, grid.inv_scale, grid.zero_point);
      store_some(out + row * out_stride + column, q, n);
    };
    for_each_value(p.scales, tile, grid_of, store_rounded);
  });
  return Status::ok();
}

}  // namespace mambaquant::cpu::MBQ_ISA
