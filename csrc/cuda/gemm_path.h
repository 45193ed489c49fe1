// Which kernel multiplies, and a hook for tests that forces it. Needs no CUDA headers.
#pragma once

#include <cstdint>

#include "mambaquant/types.h"

namespace mambaquant::cuda {

enum class GemmPath : int8_t { kAuto = 0, kGemv = 1, kSm80 = 2, kSm90 = 3 };
inline constexpr const char* kGemmPathNames[] = {"auto", "gemv", "sm80", "sm90"};
inline constexpr int32_t kNumGemmPaths = 4;

// What a test asks for; by default nothing. K = 0, which has nothing to multiply, takes kGemv regardless.
struct GemmChoice {
  GemmPath path = GemmPath::kAuto;
  int8_t tile = -1;    // of kGemmTiles, with kSm80; -1: by cost
  int16_t splits = 0;  // of K, with a tile; 0: by cost
};

// For the whole process. Fails on what the current device or this build cannot do, and says why.
Status force_gemm_choice(const GemmChoice& choice);
GemmChoice forced_gemm_choice();

}  // namespace mambaquant::cuda
