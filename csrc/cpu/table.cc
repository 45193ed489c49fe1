// The table of one ISA's kernels; compiled once per ISA.
#include "cpu/kernels.h"

namespace mambaquant::cpu::MBQ_ISA {

KernelTable kernel_table();

KernelTable kernel_table() {
  KernelTable table;
#define MBQ_FILL_POINTER(name, Params) table.name = &name;
  MBQ_CPU_KERNELS(MBQ_FILL_POINTER)
#undef MBQ_FILL_POINTER
  table.gemm_packing_version = gemm_packing_version();
  return table;
}

}  // namespace mambaquant::cpu::MBQ_ISA
