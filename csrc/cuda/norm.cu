// Launchers of norm.
#include "mambaquant/norm.h"

namespace mambaquant::cuda {

Status norm_quantize(const NormQuantizeParams&, Stream) {
  return Status::unsupported("not written yet");
}

}  // namespace mambaquant::cuda
