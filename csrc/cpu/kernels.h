// The list of CPU kernels: the one place that names them all. From it come the per-ISA
// declarations, the table of function pointers, and (in isa.cc) the public launchers that jump
// through the chosen table.
#pragma once

#include "mambaquant/conv1d.h"
#include "mambaquant/conv2d.h"
#include "mambaquant/embedding.h"
#include "mambaquant/gemm.h"
#include "mambaquant/hadamard.h"
#include "mambaquant/norm.h"
#include "mambaquant/quantize.h"
#include "mambaquant/sampling.h"
#include "mambaquant/selective_scan.h"

// X(launcher, params struct)
#define MBQ_CPU_KERNELS(X)                                    \
  X(quantize, QuantizeParams)                                 \
  X(dequantize, DequantizeParams)                             \
  X(embedding, EmbeddingParams)                               \
  X(norm_quantize, NormQuantizeParams)                        \
  X(hadamard_transform, HadamardParams)                       \
  X(hadamard_quantize, HadamardParams)                        \
  X(causal_conv1d_quantize, CausalConv1dQuantizeParams)       \
  X(depthwise_conv2d_quantize, DepthwiseConv2dQuantizeParams) \
  X(selective_scan, SelectiveScanParams)                      \
  X(pack_gemm_weight, PackGemmWeightParams)                   \
  X(gemm, GemmParams)                                         \
  X(gemm_dequantize, GemmDequantizeParams)                    \
  X(gemm_requantize, GemmRequantizeParams)                    \
  X(sample, SampleParams)

namespace mambaquant::cpu {

struct KernelTable {
#define MBQ_DECLARE_POINTER(name, Params) Status (*name)(const Params&, const Threads&) = nullptr;
  MBQ_CPU_KERNELS(MBQ_DECLARE_POINTER)
#undef MBQ_DECLARE_POINTER
  int64_t gemm_packing_version = 0;
};

}  // namespace mambaquant::cpu

#ifdef MBQ_ISA
namespace mambaquant::cpu::MBQ_ISA {
#define MBQ_DECLARE_KERNEL(name, Params) Status name(const Params& p, const Threads& threads);
MBQ_CPU_KERNELS(MBQ_DECLARE_KERNEL)
#undef MBQ_DECLARE_KERNEL
int64_t gemm_packing_version();
}  // namespace mambaquant::cpu::MBQ_ISA
#endif
