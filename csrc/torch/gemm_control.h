// Which CUDA kernel of gemm runs: a hook for tests, and the list of tiles. In builds with CUDA kernels.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace mambaquant::binding {

// "auto", "gemv", "sm80", "sm90", or the name of a tile of sm80, then with as many splits of K as given (0: by
// cost). For the whole process, until "auto". Throws std::invalid_argument on what cannot be done here.
void force_gemm_path(const std::string& name, int64_t splits);

// Every tile by name: rows, columns, depth, stages, threads, shared_bytes, can_split, and how many blocks fit
// an SM at least.
std::vector<std::pair<std::string, std::map<std::string, int64_t>>> gemm_tiles();

// What the current device would run for contiguous operands: the name of the path or tile, the splits of K and
// the bytes of workspace. Throws std::invalid_argument where no kernel serves.
struct GemmPlanFacts {
  std::string kernel;
  int64_t splits, workspace_bytes;
};
GemmPlanFacts plan_gemm(int64_t m, int64_t n, int64_t k);

}  // namespace mambaquant::binding
