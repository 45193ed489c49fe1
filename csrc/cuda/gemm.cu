// Launchers of gemm.
#include "mambaquant/gemm.h"

namespace mambaquant::cuda {

int64_t gemm_workspace_bytes(const GemmOperands&) { return 0; }

Status pack_gemm_weight(const PackGemmWeightParams&, Stream) {
  return Status::unsupported("not written yet");
}
Status gemm(const GemmParams&, Stream) { return Status::unsupported("not written yet"); }
Status gemm_dequantize(const GemmDequantizeParams&, Stream) {
  return Status::unsupported("not written yet");
}
Status gemm_requantize(const GemmRequantizeParams&, Stream) {
  return Status::unsupported("not written yet");
}

}  // namespace mambaquant::cuda
