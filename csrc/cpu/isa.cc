// ISA detection, the table in use, and the public launchers.
#include "cpu/isa.h"

#include <atomic>
#include <initializer_list>

#include "cpu/kernels.h"

namespace mambaquant::cpu {

namespace scalar {
KernelTable kernel_table();
}
#ifdef MBQ_BUILD_X86
namespace avx2 {
KernelTable kernel_table();
}
namespace avx512_vnni {
KernelTable kernel_table();
}
#endif

namespace {

struct Backend {
  const char* name;
  bool is_built;
  KernelTable table;
};

const Backend* backends() {
  static const Backend all[kNumIsas] = {
      {"scalar", true, scalar::kernel_table()},
#ifdef MBQ_BUILD_X86
      {"avx2", true, avx2::kernel_table()},
      {"avx512_vnni", true, avx512_vnni::kernel_table()},
#else
      {"avx2", false, {}},
      {"avx512_vnni", false, {}},
#endif
  };
  return all;
}

bool cpu_has(Isa isa) {
#ifdef MBQ_BUILD_X86
  __builtin_cpu_init();  // also asks the operating system (XGETBV) whether it saves the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512Vnni) return avx2 && avx512;
#endif
  return isa == Isa::kScalar;
}

std::atomic<int32_t>& current() {
  static std::atomic<int32_t> isa{static_cast<int32_t>(best_isa())};
  return isa;
}

const KernelTable& table() { return backends()[current().load(std::memory_order_relaxed)].table; }

}  // namespace

const char* isa_name(Isa isa) { return backends()[static_cast<int32_t>(isa)].name; }

bool isa_is_built(Isa isa) {
  const int32_t i = static_cast<int32_t>(isa);
  return i >= 0 && i < kNumIsas && backends()[i].is_built;
}

bool isa_is_supported(Isa isa) { return isa_is_built(isa) && cpu_has(isa); }

Isa best_isa() {
  for (const Isa isa : {Isa::kAvx512Vnni, Isa::kAvx2}) {
    if (isa_is_supported(isa)) return isa;
  }
  return Isa::kScalar;
}

Isa current_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

int64_t gemm_packing_version(Isa isa) {
  return isa_is_built(isa) ? backends()[static_cast<int32_t>(isa)].table.gemm_packing_version : 0;
}

Status force_isa(Isa isa) {
  if (!isa_is_built(isa)) return Status::unsupported("this build has no kernels for that ISA");
  if (!cpu_has(isa)) return Status::unsupported("this processor cannot run that ISA");
  current().store(static_cast<int32_t>(isa), std::memory_order_relaxed);
  return Status::ok();
}

#define MBQ_DEFINE_LAUNCHER(name, Params) \
  Status name(const Params& p, const Threads& threads) { return table().name(p, threads); }
MBQ_CPU_KERNELS(MBQ_DEFINE_LAUNCHER)
#undef MBQ_DEFINE_LAUNCHER

}  // namespace mambaquant::cpu
