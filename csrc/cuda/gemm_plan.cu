// Chooses kernels by a count of cycles. Host code.
#include "cuda/gemm_plan.h"

#include <atomic>

#include "cuda/common/launch.h"
#include "cuda/gemm_tile.h"

namespace mambaquant::cuda {

namespace {

// Indices within a tile reach this far beyond the last row.
constexpr int64_t kMaxTiledSize = INT32_MAX - 256;
constexpr int32_t kMaxSplits = 8;

// What an SM does in a cycle: int8 products of mma.sync (the data sheets of A100, and about what it
// reaches on H100) and of wgmma, bytes from L2. Nominal figures; no GPU was measured.
constexpr int64_t kProductsPerCycle = 2048, kProductsPerCycleSm90 = 4096, kL2BytesPerCycle = 32;
// Filling the pipeline and draining the epilogue, once per wave of blocks.
constexpr int64_t kWaveCycles = 1500;

struct Device {
  int32_t capability, multiprocessors;
  int64_t shared_bytes;  // that a block may have
};

Device current_device() {
  return {compute_capability(), multiprocessor_count(),
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// How a product is cut into blocks.
struct Cut {
  int64_t tiles;
  int32_t splits, depth_per_split;
};

Cut make_cut(const GemmTile& tile, const GemmOperands& p, int32_t splits) {
  const int64_t steps = ceil_div(p.k, tile.depth);
  const int64_t steps_per_split = ceil_div(steps, splits);
  return {ceil_div(p.m, tile.rows) * ceil_div(p.n, tile.columns),
          static_cast<int32_t>(ceil_div(steps, steps_per_split)),  // none of them empty
          static_cast<int32_t>(steps_per_split * tile.depth)};
}

// Waves of one block per SM (blocks that share an SM share its rate), each as long as the slower of products
// and loads; then the sums that splits leave and read.
int64_t count_cycles(const GemmTile& tile, const Cut& cut, int32_t multiprocessors,
                     int64_t products_per_cycle) {
  const int64_t area = static_cast<int64_t>(tile.rows) * tile.columns;
  const int64_t products = area * cut.depth_per_split / products_per_cycle;
  const int64_t loads =
      static_cast<int64_t>(tile.rows + tile.columns) * cut.depth_per_split / kL2BytesPerCycle;
  const int64_t sums = cut.splits > 1 ? area * 4 * cut.splits / kL2BytesPerCycle : 0;
  const int64_t waves = ceil_div(cut.tiles * cut.splits, multiprocessors > 0 ? multiprocessors : 1);
  return waves * ((products > loads ? products : loads) + kWaveCycles) + sums;
}

// TMA reads rows that do not overlap, at distances below 2^40 bytes; rows that must be copied are like that.
bool fits_sm90(const GemmOperands& p, bool copies_a) {
  return copies_a || p.m == 1 || (p.a_stride_row >= p.k && p.a_stride_row < (int64_t{1} << 40));
}

// The cheapest of the tiles that the device can run and the choice allows.
void choose_tile(const GemmOperands& p, const Device& device, const GemmChoice& choice,
                 GemmPlan* plan) {
  int64_t best = INT64_MAX;
  for (int32_t t = 0; t < kNumGemmTiles; ++t) {
    const GemmTile& tile = kGemmTiles[t];
    if (tile.operand_bytes() > device.shared_bytes) continue;
    if (choice.tile >= 0 && t != choice.tile) continue;
    for (int32_t splits = 1; splits <= (tile.can_split ? kMaxSplits : 1); ++splits) {
      if (choice.splits > 0 && splits != choice.splits) continue;
      const Cut cut = make_cut(tile, p, splits);
      const int64_t cycles = count_cycles(tile, cut, device.multiprocessors, kProductsPerCycle);
      if (cycles >= best) continue;
      best = cycles;
      plan->path = GemmPath::kSm80;
      plan->tile = t;
      plan->splits = cut.splits;
      plan->depth_per_split = cut.depth_per_split;
    }
  }
  const bool may_sm90 = choice.path == GemmPath::kAuto && device.capability == 90 && kHasGemmSm90 &&
                        fits_sm90(p, plan->copies_a);
  if (may_sm90 && count_cycles(kGemmTileSm90, make_cut(kGemmTileSm90, p, 1), device.multiprocessors,
                               kProductsPerCycleSm90) < best) {
    plan->path = GemmPath::kSm90;
    plan->splits = 1;
  }
}

Status check_sm90(const Device& device) {
  if (!kHasGemmSm90) return Status::unsupported("this build has no kernels for sm_90a");
  if (device.capability != 90)
    return Status::unsupported("sm90 kernels need a device of compute capability 9.0");
  return Status::ok();
}

void choose_path(const GemmOperands& p, const Device& device, GemmPlan* plan) {
  const GemmChoice choice = forced_gemm_choice();
  const bool is_small = choice.path == GemmPath::kAuto && p.m <= kMaxGemvRows;
  if (p.k == 0 || is_small || choice.path == GemmPath::kGemv) {
    plan->path = GemmPath::kGemv;
    return;
  }
  if (p.m > kMaxTiledSize || p.n > kMaxTiledSize) {
    plan->status = Status::unsupported("expected M and N of at most 2^31 - 257");
    return;
  }
  if (choice.path == GemmPath::kSm90) {
    plan->path = GemmPath::kSm90;
    plan->status = check_sm90(device);
    if (plan->status.is_ok() && !fits_sm90(p, plan->copies_a))
      plan->status = Status::unsupported("sm90 kernels need rows of a that do not overlap");
    return;
  }
  choose_tile(p, device, choice, plan);
}

std::atomic<GemmChoice>& forced_choice() {
  static std::atomic<GemmChoice> choice{GemmChoice{}};
  static_assert(std::atomic<GemmChoice>::is_always_lock_free);
  return choice;
}

}  // namespace

Status force_gemm_choice(const GemmChoice& choice) {
  if (choice.path == GemmPath::kSm90) {
    const Status possible = check_sm90(current_device());
    if (!possible.is_ok()) return possible;
  }
  if (choice.tile >= 0 && kGemmTiles[choice.tile].operand_bytes() > current_device().shared_bytes) {
    return Status::unsupported("the device has too little shared memory for this tile");
  }
  if (choice.splits != 0 && (choice.tile < 0 || choice.splits < 1 || choice.splits > kMaxSplits ||
                             (choice.splits > 1 && !kGemmTiles[choice.tile].can_split))) {
    return Status::unsupported("expected splits from 1 to 8, with a tile that can be split");
  }
  forced_choice() = choice;
  return Status::ok();
}

GemmChoice forced_gemm_choice() { return forced_choice(); }

GemmPlan plan_gemm(const GemmOperands& p) {
  GemmPlan plan;
  if (p.m == 0 || p.n == 0) return plan;
  plan.copies_a = p.k % kGemmVectorBytes != 0 ||
                  !is_aligned(p.a, p.m > 1 ? p.a_stride_row : 0, kGemmVectorBytes);
  if (plan.copies_a)
    plan.a_bytes = round_up(p.m * round_up(p.k, kGemmDepthMultiple), kGemmWorkspaceAlignment);
  choose_path(p, current_device(), &plan);
  if (plan.splits > 1) {
    const GemmTile& tile = kGemmTiles[plan.tile];
    const Cut cut = make_cut(tile, p, plan.splits);
    plan.partial_bytes = cut.tiles * plan.splits * tile.rows * tile.columns * 4;
    plan.arrival_bytes = round_up(cut.tiles * 4, kGemmWorkspaceAlignment);
  }
  return plan;
}

}  // namespace mambaquant::cuda
