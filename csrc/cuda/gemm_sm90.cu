#include "cuda/gemm_tile.h"
namespace mambaquant::cuda {
bool has_gemm_sm90() { return false; }
Status launch_gemm_sm90(const AlignedOperands&, const GemmEpilogueParams&, Stream) {
  return Status::unsupported("this build has no kernels for sm_90a");
}
}  // namespace mambaquant::cuda
