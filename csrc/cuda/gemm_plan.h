// How a product is run on the current device: path, tile, splits of K, and the workspace that takes.
#pragma once

#include "cuda/gemm_path.h"
#include "mambaquant/gemm.h"

namespace mambaquant::cuda {

// Rows of a up to which reading the weight is the bound and gemm_small_kernel.cuh (kGemv) runs.
inline constexpr int64_t kMaxGemvRows = 16;

// Parts of the workspace start at multiples of this.
inline constexpr int64_t kGemmWorkspaceAlignment = 256;

struct GemmPlan {
  Status status;  // unsupported where no kernel serves
  GemmPath path = GemmPath::kGemv;
  int32_t tile = 0, splits = 1, depth_per_split = 0;  // with kSm80
  bool copies_a = false;                              // to rows of whole vectors, in the workspace
  int64_t a_bytes = 0, partial_bytes = 0, arrival_bytes = 0;

  int64_t workspace_bytes() const { return a_bytes + partial_bytes + arrival_bytes; }
};

// Depends on the operands, the current device and the forced choice alone, so that what sizes the workspace
// and what launches agree.
GemmPlan plan_gemm(const GemmOperands& p);

}  // namespace mambaquant::cuda
