// gemm for many rows on Hopper: wgmma and TMA through CUTLASS 3.x. Compiled for sm_90a alone; the kernels of
// gemm_tile_kernel.cuh compute the same bits on every device and are its test twin.
//
// A persistent grid, one block an SM: one warp of the first warpgroup requests tiles of a (128 x 128) and of
// the weight (256 x 128) by TMA, four stages ahead; two warpgroups hold 64 x 256 sums each, 128 registers a
// thread, and issue m64n256k32 products that read both operands from shared memory. Rows, columns and
// depths outside of the matrices arrive as zeros. Bound: bytes from L2, 384 * 128 of them per 1,024 cycles
// of products.
// The epilogue is that of the other kernels (gemm_epilogue.cuh): a warp's sums lie in its registers as eight
// pieces of 16 x 32 in the order of mma.sync, and pass through 2.5 KB of its own.
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/common/launch.h"
#include "cuda/gemm_epilogue.cuh"
#include "cuda/gemm_tile.h"

namespace mambaquant::cuda {

namespace {

using RowMajorStride = cute::Stride<int64_t, cute::Int<1>, int64_t>;

// The 128-byte swizzle of TMA and wgmma repeats after so many bytes. CUTLASS's descriptors say that each stage begins
// with the pattern, but its own storage is aligned to 128 bytes only.
constexpr int64_t kSwizzlePeriod = 1024;

// What CUTLASS's kernel calls with the sums of a tile.
class TileEpilogue {
 public:
  // Names that the kernel layer asks for. There is no source matrix, and results are written here, so that
  // the element types say nothing.
  using DispatchPolicy = cutlass::epilogue::NoSmemWarpSpecialized;
  using ElementC = int32_t;
  using ElementD = int32_t;
  using StrideC = RowMajorStride;
  using StrideD = RowMajorStride;
  // As aligned as the stages behind it want to be.
  struct SharedStorage {
    alignas(kSwizzlePeriod) int32_t pieces[kGemmTileSm90.warps_rows][kPieceInts];
  };
  struct Arguments {
    GemmEpilogueParams epilogue;
  };
  using Params = Arguments;

  template <typename ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments,
                                                  void*) {
    return arguments;
  }
  template <typename ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <typename ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit TileEpilogue(const Params& params) : params_(params) {}

  template <typename ProblemShape, typename TileShape, typename TileCoord, typename Sums,
            typename TiledMma, typename Residue>
  CUTLASS_DEVICE void operator()(const ProblemShape&, const TileShape&, const TileCoord& coord,
                                 const Sums& sums, const TiledMma&, const Residue&, int thread,
                                 char* shared) const {
    constexpr GemmTile kTile = kGemmTileSm90;
    static_assert(decltype(cute::size(sums))::value * kTile.multiplying_threads() ==
                  kTile.rows * kTile.columns);
    const int32_t warp = thread / kWarpSize;  // of those that multiply
    const GemmOrigin origin{
        static_cast<int64_t>(cute::get<0>(coord)) * kTile.rows + warp * kPieceRows,
        static_cast<int64_t>(cute::get<1>(coord)) * kTile.columns};
    finish_warp_tile<1, kTile.columns / kPieceColumns>(
        params_.epilogue, origin,
        [&](int32_t, int32_t group, int32_t e) { return sums(group * 4 + e); },
        reinterpret_cast<SharedStorage*>(shared)->pieces[warp]);
  }

 private:
  const Params& params_;
};

using TileShape = cute::Shape<cute::Int<kGemmTileSm90.rows>, cute::Int<kGemmTileSm90.columns>,
                              cute::Int<kGemmTileSm90.depth>>;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor,
    kGemmVectorBytes, int8_t, cutlass::layout::ColumnMajor, kGemmVectorBytes, int32_t, TileShape,
    cute::Shape<cute::_1, cute::_1, cute::_1>,
    cutlass::gemm::collective::StageCount<kGemmTileSm90.stages>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<
    cute::Shape<int, int, int, int>, Mainloop,
    cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<TileEpilogue>>;
static_assert(Kernel::MaxThreadsPerBlock == kGemmThreadsSm90);
static_assert(Kernel::SharedStorageSize <= kGemmSharedBytesSm90);
static_assert((offsetof(Kernel::SharedStorage, tensors) +
               offsetof(Kernel::SharedStorage::TensorStorage, mainloop)) %
                  kSwizzlePeriod ==
              0);

}  // namespace

Status launch_gemm_sm90(const AlignedOperands& p, const GemmEpilogueParams& epilogue,
                        Stream stream) {
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = multiprocessor_count();
  const typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), 1},
      {p.a, {p.a_stride_row, {}, 0}, p.weight, {p.k, {}, 0}},
      {{epilogue}},
      hardware};
  if (!Kernel::can_implement(arguments) || Kernel::get_workspace_size(arguments) != 0)
    return Status::unsupported("CUTLASS cannot multiply matrices of this size on sm_90a");
  const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  const auto kernel = cutlass::device_kernel<Kernel>;
  const Status allowed = allow_shared_memory(kernel, Kernel::SharedStorageSize);
  if (!allowed.is_ok()) return allowed;
  kernel<<<Kernel::get_grid_shape(params), Kernel::get_block_shape(), Kernel::SharedStorageSize,
           to_cuda(stream)>>>(params);
  return check_launch();
}

}  // namespace mambaquant::cuda
