// The tiles for a few dozen rows, or few columns.
#include "cuda/gemm_tile_kernel.cuh"

namespace mambaquant::cuda {

template Status launch_gemm_tile<2>(const GemmTileParams&, Stream);
template Status launch_gemm_tile<3>(const GemmTileParams&, Stream);
template Status launch_gemm_tile<4>(const GemmTileParams&, Stream);

}  // namespace mambaquant::cuda
