// Which instruction set the CPU kernels run on. Chosen when the library is loaded: the best that the
// processor has, or the one that MAMBAQUANT_CPU_ISA names.
#pragma once

#include <cstdint>

#include "mambaquant/types.h"

namespace mambaquant::cpu {

enum class Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2 };
inline constexpr int32_t kNumIsas = 3;

const char* isa_name(Isa isa);   // "scalar", "avx2", "avx512_vnni"
bool isa_is_built(Isa isa);      // compiled into this library
bool isa_is_supported(Isa isa);  // built, and this processor and operating system can run it
Isa best_isa();
Isa current_isa();

// Version of the order in which its pack_gemm_weight lays weights out; 0 for an ISA that is not built.
int64_t gemm_packing_version(Isa isa);

// Status::unsupported, and no change, for an ISA that cannot run here.
Status force_isa(Isa isa);

}  // namespace mambaquant::cpu
