// pack_gemm_weight, gemm, gemm_dequantize, gemm_requantize. Formulas: mambaquant/gemm.h; the inner
// loop of each ISA: gemm_micro.h; a tile: gemm_tile.h.
//
// A task is one panel of kTileColumns weight columns times a block of row tiles: the block stays in
// L2 while panels pass, the panel stays in L1 or L2 while tiles pass, and the next panel is fetched
// meanwhile. Activations are read where they lie if the ISA multiplies bytes. Results come from the
// registers that hold the sums, or, where a call wants more than usual, from a tile in memory; the
// int32 matrix never exists.
//
// Bound: arithmetic for many rows, 2*M*N*K operations. AVX-512 VNNI does 256 per cycle and core (two
// vpdpbusd of 64 products), AVX2 64 (two vpmaddwd of 16). For few rows (decode) bytes: every weight
// is read once, N*K bytes, in address order, panels split among the threads in even runs.
//
// Measured on one core of a shared Zen 5, best of repeated runs, M = 64 to 2048, share of vpdpbusd
// alone: K >= 768 and N >= 768: 0.95 to 0.97, with a residual from memory 0.92; N = 80, K = 1536: 0.90;
// N = 1536, K = 48, where four bytes are stored every 48 products: 0.75 to 0.80. Two cores give twice
// that. AVX2: 0.77 of vpmaddwd alone. Weights from memory, one core, which reads 41 to 45 GB/s: M = 1:
// 40 to 45 GB/s, AVX2 too; M = 12: 37 to 39; from M = 16 arithmetic bounds it.
#include "mambaquant/gemm.h"

#include <cstring>

#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

static_assert(kGemmColumnMultiple % kTileColumns == 0);

constexpr int64_t kBlocksPerThread = 8;  // tasks that an even split among threads needs
// Where all the weights fit L2 too, blocks are small: successive panels then write neighbouring
// lines of few rows, instead of a line in each of many rows (K = 48: a quarter faster).
constexpr int64_t kTilesPerSmallBlock = 8, kSmallWeightBytes = 512 * 1024;
constexpr int64_t kTilesPerBlock = 64;  // at most; a block's rows have a number each on the stack
constexpr int64_t kPackGrainBytes = 65536;
// What a thread must have to do before it is worth waking: cycles, by a coarse count of products
// and bytes.
constexpr int64_t kThreadCycles = 10000, kProductsPerCycle = 128, kWeightBytesPerCycle = 8;
// Weights are fetched so far ahead, or, where several tiles share a panel, as far as the next one: the time in
// which a tile is multiplied covers the way from memory.
constexpr int64_t kAheadBytes = 8192;

// A residual of more bytes is taken to lie beyond the caches that a thread has for itself: fetching takes
// hundredths of the time, and saves a tenth where it comes from memory.
constexpr int64_t kFarBytes = 4 * 1024 * 1024;

int64_t padded_depth(int64_t k) { return round_up(k, kGemmCpuDepthMultiple); }

// How the work is cut: row tiles into blocks that fit L2, columns into panels; a task is a block
// times a panel, block after block, and each thread slot has one run of tasks. Cuts are even: 13
// rows are tiles of 6 and 7.
struct Plan {
  int64_t padded_k, tiles, panels, blocks, slots;
  int64_t tile_rows, large_tiles;  // the first large_tiles tiles have a row more

  Plan(const GemmOperands& p, const Threads& threads)
      : padded_k(padded_depth(p.k)),
        tiles((p.m + kTileRows - 1) / kTileRows),
        panels((p.n + kTileColumns - 1) / kTileColumns),
        tile_rows(tiles > 0 ? p.m / tiles : 0),
        large_tiles(p.m - tile_rows * tiles) {
    blocks = (tiles + kTilesPerBlock - 1) / kTilesPerBlock;
    at_least((p.m * padded_k + kGemmBlockBytes - 1) / kGemmBlockBytes);
    at_least(kBlocksPerThread * threads.num_threads / (panels + 1));
    const bool is_small = panels * kTileColumns * padded_k <= kSmallWeightBytes;
    if (is_small) at_least(tiles / kTilesPerSmallBlock);
    blocks = blocks < tiles ? blocks : tiles;
    const int64_t weights = panels * kTileColumns * (padded_k + 1);
    const int64_t cycles = p.m * weights / kProductsPerCycle + weights / kWeightBytesPerCycle;
    const int64_t useful = cycles * threads.grain_divisor / kThreadCycles + 1;
    slots = useful < threads.num_threads ? useful : threads.num_threads;
    slots = slots < tasks() ? slots : tasks();
  }

  void at_least(int64_t count) { blocks = blocks > count ? blocks : count; }
  int64_t tasks() const { return blocks * panels; }
  int64_t block_tile(int64_t block) const { return block * tiles / blocks; }
  int64_t tile_row(int64_t tile) const {
    return tile * tile_rows + (tile < large_tiles ? tile : large_tiles);
  }
};

// A block of activations and what its sums start at.
struct Block {
  Block(const GemmOperands& p, const Plan& plan, int64_t index, int8_t* scratch)
      : first_tile(plan.block_tile(index)),
        last_tile(plan.block_tile(index + 1)),
        first_row(plan.tile_row(first_tile)) {
    const int64_t count = plan.tile_row(last_tile) - first_row;
    const SourceRows source{p.a + first_row * p.a_stride_row, p.a_stride_row, count, p.k};
    rows = prepare_rows(source, scratch, start);
  }

  int64_t first_tile, last_tile, first_row;
  Rows rows;
  int32_t start[kTilesPerBlock * kTileRows];
};

F32 load_any_float(const void* p, DType dtype, int64_t index, int64_t n) {
  if (dtype == DType::kF32) return load_up_to(static_cast<const float*>(p) + index, n);
  if (dtype == DType::kF16) return load_up_to(static_cast<const Float16*>(p) + index, n);
  return load_up_to(static_cast<const BFloat16*>(p) + index, n);
}

// What a call does with its sums: in the registers, with the terms of each column from `scales` and
// out_scale, or by take_tile from memory.
struct Output {
  bool is_direct = false;
  Finish finish = Finish::kSums;
  int64_t out_bytes = 0;  // of an element
  void* out = nullptr;
  const float* residual = nullptr;
  int64_t residual_stride = 0;
  GemmScales scales;
  const float* out_scale = nullptr;
};

// x + -0 is x, for x = -0 too, which x + 0 is not.
F32 bias_or_none(const float* bias, int64_t column, int64_t n) {
  return bias == nullptr ? set1(-0.0f) : load_up_to(bias + column, n);
}
I32 offset_or_none(const int32_t* offset, int64_t column, int64_t n) {
  return offset == nullptr ? set1_i32(0) : load_i32(offset + column, n);
}

// For whole vectors. What a finish has no use for stays as it is.
void fill_terms(const Output& o, int64_t column, int64_t columns, ColumnTerms* terms) {
  if (o.finish == Finish::kSums) return;
  for (int64_t v = 0; v < columns; v += kLanes) {
    const int64_t c = column + v;
    store(terms->scale + v, set1(o.scales.a_scale[0]) * load(o.scales.b_scale + c));
    if (o.finish == Finish::kValues) continue;
    store_i32(terms->offset + v, offset_or_none(o.scales.acc_offset, c, kLanes));
    store(terms->bias + v, bias_or_none(o.scales.bias, c, kLanes));
    if (o.finish == Finish::kAdded) continue;
    store(terms->inv_scale + v, set1(1.0f) / load(o.out_scale + c));
  }
}

// Sums in memory, kTileColumns a row, and their place in the (M, N) result.
struct Tile {
  const int32_t* acc;
  int64_t row, rows, column, columns;
};

// The functions of a call: for tiles of both heights, as they finish in registers and for sums in
// memory.
struct Functions {
  Functions(const Plan& plan, Finish finish)
      : direct{tile_functions(finish, plan.tile_rows), tile_functions(finish, plan.tile_rows + 1)},
        sums{tile_functions(Finish::kSums, plan.tile_rows),
             tile_functions(Finish::kSums, plan.tile_rows + 1)} {}

  TileFunctions direct[2], sums[2];
};

template <typename TakeTile>
struct Call {
  const GemmOperands& p;
  const Plan& plan;
  const Output& output;
  const Functions& functions;
  const TakeTile& take_tile;
};

// One block times one panel. While it goes on, the panel after it is fetched.
template <typename TakeTile>
void run_task(const Call<TakeTile>& call, const Block& block, int64_t panel) {
  const Plan& plan = call.plan;
  const Output& output = call.output;
  const int64_t n = call.p.n, tiles = block.last_tile - block.first_tile;
  const int64_t panel_bytes = kTileColumns * plan.padded_k;
  const int64_t column = panel * kTileColumns;
  const int64_t columns = n - column < kTileColumns ? n - column : kTileColumns;
  const bool is_empty = plan.padded_k == 0;  // every sum is 0
  const bool is_narrow = columns <= kNarrowVectors * kLanes;
  const bool is_whole = columns == (is_narrow ? kNarrowVectors * kLanes : kTileColumns);
  const bool is_direct = output.is_direct && is_whole && !is_empty;
  const TileFunctions* const heights = is_direct ? call.functions.direct : call.functions.sums;
  const TileFunction small = is_narrow ? heights[0].narrow : heights[0].full;
  const TileFunction large = is_narrow ? heights[1].narrow : heights[1].full;
  alignas(64) int32_t acc[kTileRows * kTileColumns];
  if (is_empty) std::memset(acc, 0, sizeof(acc));
  ColumnTerms terms;
  if (is_direct) fill_terms(output, column, columns, &terms);
  TileTask task;
  task.weights.panel = call.p.packed + panel * panel_bytes;
  const bool is_shared = tiles > 1 && panel_bytes > kAheadBytes;
  task.weights.ahead = task.weights.panel + (is_shared ? panel_bytes : kAheadBytes);
  task.weights.ahead_step = kStepBytes / tiles;
  task.terms = &terms;
  task.output = {acc, is_direct ? n : kTileColumns, nullptr, output.residual_stride,
                 call.p.m * n * static_cast<int64_t>(sizeof(float)) > kFarBytes};
  const int64_t ahead_bytes = panel_bytes / tiles;
  int64_t row = block.first_row;
  for (int64_t t = block.first_tile; t < block.last_tile; ++t) {
    const bool is_large = t < plan.large_tiles;
    const int64_t rows = plan.tile_rows + (is_large ? 1 : 0);
    task.rows = block.rows.from(row - block.first_row);
    task.start = block.start + (row - block.first_row);
    if (is_direct) {
      task.output.out = static_cast<char*>(output.out) + (row * n + column) * output.out_bytes;
      if (output.residual != nullptr) {
        task.output.residual = output.residual + row * output.residual_stride + column;
      }
    }
    if (!is_empty) (is_large ? large : small)(task);
    if (!is_direct) call.take_tile(Tile{acc, row, rows, column, columns});
    task.weights.ahead += ahead_bytes;
    row += rows;
  }
}

// What the fetches ahead assume when a thread begins; they go on while the rows are prepared.
void fetch_first_weights(const int8_t* panel) {
  for (int64_t i = 0; i < kAheadBytes; i += 64) prefetch(panel + i);
}

// Makes the (M, N) result, from several threads: directly where `output` can, else by take_tile(Tile).
template <typename TakeTile>
void for_each_tile(const GemmOperands& p, const Threads& threads, const Output& output,
                   const TakeTile& take_tile) {
  const Plan plan(p, threads);
  const Functions functions(plan, output.finish);
  const Call<TakeTile> call{p, plan, output, functions, take_tile};
  const int64_t scratch_bytes = gemm_scratch_bytes(p.m, p.k);
  threads.parallel_for(plan.slots, 1, [&](int64_t begin, int64_t end) {
    alignas(64) int8_t stack[kGemmStackBytes];
    for (int64_t slot = begin; slot < end; ++slot) {
      int8_t* scratch =
          scratch_bytes <= kGemmStackBytes ? stack : p.workspace + slot * scratch_bytes;
      const int64_t first = slot * plan.tasks() / plan.slots;
      const int64_t last = (slot + 1) * plan.tasks() / plan.slots;
      fetch_first_weights(p.packed + first % plan.panels * kTileColumns * plan.padded_k);
      for (int64_t task = first; task < last;) {
        const Block block(p, plan, task / plan.panels, scratch);
        do {
          run_task(call, block, task % plan.panels);
        } while (++task < last && task % plan.panels != 0);
      }
    }
  });
}

// Calls store_vector(row, column, lanes, value, columns) for a tile; value without residual,
// columns what begin_columns(column, lanes) gave. Arguments by value here and locals below: the
// stores could alias the params.
template <typename Begin, typename Store>
void for_each_value(const GemmScales s, const Tile tile, const Begin& begin_columns,
                    const Store& store_vector) {
  for (int64_t c = 0; c < tile.columns; c += kLanes) {
    const int64_t n = tile.columns - c < kLanes ? tile.columns - c : kLanes;
    const int64_t column = tile.column + c;
    const F32 b_scale = load_up_to(s.b_scale + column, n);
    const F32 static_scale = set1(s.a_scale[0]) * b_scale;
    const F32 bias = bias_or_none(s.bias, column, n);
    const I32 offset = offset_or_none(s.acc_offset, column, n);
    const auto columns = begin_columns(column, n);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const F32 scale = s.a_scale_is_per_token ? set1(s.a_scale[row]) * b_scale : static_scale;
      const I32 acc = load_i32(tile.acc + r * kTileColumns + c);
      store_vector(row, column, n, to_f32(acc - offset) * scale + bias, columns);
    }
  }
}

Output make_output(const GemmDequantizeParams& p) {
  const bool has_columns = p.scales.acc_offset != nullptr || p.scales.bias != nullptr;
  const bool is_added = p.residual != nullptr;
  Output o;
  o.is_direct = p.out_dtype == DType::kF32 && !p.scales.a_scale_is_per_token &&
                (is_added ? p.residual_dtype == DType::kF32 : !has_columns);
  o.finish = is_added ? Finish::kAdded : Finish::kValues;
  o.out_bytes = sizeof(float);
  o.out = p.out;
  o.residual = static_cast<const float*>(p.residual);
  o.residual_stride = p.residual_stride_row;
  o.scales = p.scales;
  return o;
}

template <typename T>
Status gemm_dequantize_typed(const GemmDequantizeParams& p, const Threads& threads) {
  for_each_tile(p.operands, threads, make_output(p), [&](const Tile& tile) {
    T* const out = static_cast<T*>(p.out);
    const void* const residual = p.residual;
    const DType residual_dtype = p.residual_dtype;
    const int64_t out_stride = p.operands.n, residual_stride = p.residual_stride_row;
    const auto no_columns = [](int64_t, int64_t) { return 0; };
    const auto store_value = [=](int64_t row, int64_t column, int64_t n, F32 value, int) {
      if (residual != nullptr) {
        value = value + load_any_float(residual, residual_dtype, row * residual_stride + column, n);
      }
      store_up_to(out + row * out_stride + column, value, n);
    };
    for_each_value(p.scales, tile, no_columns, store_value);
  });
  return Status::ok();
}

Output make_output(const GemmRequantizeParams& p) {
  Output o;
  o.is_direct = !p.scales.a_scale_is_per_token && p.out_zero_point == nullptr;
  o.finish = Finish::kRounded;
  o.out_bytes = sizeof(int8_t);
  o.out = p.q;
  o.scales = p.scales;
  o.out_scale = p.out_scale;
  return o;
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
  Output output;
  output.is_direct = true;
  output.out_bytes = sizeof(int32_t);
  output.out = p.acc;
  for_each_tile(p.operands, threads, output, [&](const Tile& tile) {
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
  for_each_tile(p.operands, threads, make_output(p), [&](const Tile& tile) {
    const auto grid_of = [&](int64_t column, int64_t n) {
      // A tail's unused lanes divide by 0 and are not stored.
      OutputGrid grid{set1(1.0f) / load_up_to(p.out_scale + column, n), set1(0.0f)};
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
      store_up_to(out + row * out_stride + column, q, n);
    };
    for_each_value(p.scales, tile, grid_of, store_rounded);
  });
  return Status::ok();
}

}  // namespace mambaquant::cpu::MBQ_ISA
