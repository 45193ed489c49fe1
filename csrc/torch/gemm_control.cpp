#include "torch/gemm_control.h"

#include <stdexcept>

#include "cuda/gemm_plan.h"
#include "cuda/gemm_tiles.h"

namespace mambaquant::binding {
namespace {

using cuda::GemmChoice;
using cuda::GemmPath;
using cuda::GemmTile;

GemmChoice choice_of(const std::string& name, int64_t splits) {
  std::string names;
  const auto is = [&](const char* candidate) {
    names += (names.empty() ? "" : ", ") + std::string(candidate);
    return name == candidate;
  };
  for (int32_t i = 0; i < cuda::kNumGemmPaths; ++i) {
    if (is(cuda::kGemmPathNames[i])) {
      return {static_cast<GemmPath>(i), -1, static_cast<int16_t>(splits)};
    }
  }
  for (int32_t i = 0; i < cuda::kNumGemmTiles; ++i) {
    if (is(cuda::kGemmTiles[i].name)) {
      return {GemmPath::kSm80, static_cast<int8_t>(i), static_cast<int16_t>(splits)};
    }
  }
  throw std::invalid_argument("force_gemm_path: expected one of " + names + ", got '" + name + "'");
}

}  // namespace

void force_gemm_path(const std::string& name, int64_t splits) {
  if (splits < 0 || splits > INT16_MAX) {
    throw std::invalid_argument("force_gemm_path: expected splits of at least 0 and below 2^15");
  }
  const Status status = cuda::force_gemm_choice(choice_of(name, splits));
  if (!status.is_ok()) {
    throw std::invalid_argument("force_gemm_path: " + name + ": " + status.message);
  }
}

GemmPlanFacts plan_gemm(int64_t m, int64_t n, int64_t k) {
  GemmOperands p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.a_stride_row = k;
  const cuda::GemmPlan plan = cuda::plan_gemm(p);
  if (!plan.status.is_ok()) throw std::invalid_argument(plan.status.message);
  const char* kernel = plan.path == GemmPath::kSm80
                           ? cuda::kGemmTiles[plan.tile].name
                           : cuda::kGemmPathNames[static_cast<int32_t>(plan.path)];
  return {kernel, plan.splits, plan.workspace_bytes()};
}

std::vector<std::pair<std::string, std::map<std::string, int64_t>>> gemm_tiles() {
  std::vector<std::pair<std::string, std::map<std::string, int64_t>>> tiles;
  const auto add = [&](const GemmTile& tile, int64_t threads, int64_t shared_bytes) {
    tiles.emplace_back(tile.name,
                       std::map<std::string, int64_t>{{"rows", tile.rows},
                                                      {"columns", tile.columns},
                                                      {"depth", tile.depth},
                                                      {"stages", tile.stages},
                                                      {"threads", threads},
                                                      {"shared_bytes", shared_bytes},
                                                      {"can_split", tile.can_split},
                                                      {"blocks_per_sm", tile.blocks_per_sm}});
  };
  for (const GemmTile& tile : cuda::kGemmTiles) {
    add(tile, tile.multiplying_threads(), tile.operand_bytes());
  }
  add(cuda::kGemmTileSm90, cuda::kGemmThreadsSm90, cuda::kGemmSharedBytesSm90);
  return tiles;
}

}  // namespace mambaquant::binding
