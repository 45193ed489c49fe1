// The tiles for many rows: in a file of their own, so that two cores compile them.
#include "cuda/gemm_tile_kernel.cuh"

namespace mambaquant::cuda {

template Status launch_gemm_tile<0>(const GemmTileParams&, Stream);
template Status launch_gemm_tile<1>(const GemmTileParams&, Stream);

}  // namespace mambaquant::cuda
