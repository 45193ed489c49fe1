// Launchers of gemm.
#include <utility>

#include "cuda/common/launch.h"
#include "cuda/gemm_copy_kernel.cuh"
#include "cuda/gemm_plan.h"
#include "cuda/gemm_small_kernel.cuh"
#include "cuda/gemm_tile.h"
#include "mambaquant/gemm.h"

namespace mambaquant::cuda {

namespace {

Status copy_rows(const CopyRowsParams& p, Stream stream) {
  const bool fits = p.columns == p.padded_columns &&
                    is_aligned(p.matrix, p.rows > 1 ? p.stride_row : 0, kGemmVectorBytes);
  const int64_t vectors = p.padded_rows * p.padded_columns / (fits ? kGemmVectorBytes : 4);
  if (vectors == 0) return Status::ok();
  const int64_t blocks = ceil_div(vectors, kCopyThreads);
  if (blocks > INT32_MAX) return Status::unsupported("expected fewer than 2^41 elements to copy");
  const auto grid = static_cast<uint32_t>(blocks);
  if (fits) {
    gemm_copy_rows_kernel<kGemmVectorBytes><<<grid, kCopyThreads, 0, to_cuda(stream)>>>(p);
  } else {
    gemm_copy_rows_kernel<4><<<grid, kCopyThreads, 0, to_cuda(stream)>>>(p);
  }
  return check_launch();
}

Status check_operands(const GemmOperands& p, const int32_t* acc_offset) {
  if (p.k > kMaxK)
    return Status::unsupported("expected K of at most 131072, beyond which int32 sums overflow");
  if (acc_offset != nullptr && p.k > kMaxKWithOffset) {
    return Status::unsupported(
        "expected K of at most 65536 with acc_offset, beyond which int32 sums overflow");
  }
  if (!is_aligned(p.packed, 0, kGemmVectorBytes))
    return Status::unsupported("expected packed to start at a multiple of 16 bytes");
  if (!is_aligned(p.workspace, 0, kGemmVectorBytes))
    return Status::unsupported("expected a workspace that starts at a multiple of 16 bytes");
  return Status::ok();
}

// Whether four neighbouring columns of every array of the epilogue can be moved at once.
bool has_vector_columns(const GemmEpilogueParams& p) {
  const auto fits = [](const void* pointer, int64_t row_stride, int64_t element_bytes) {
    return is_aligned(pointer, row_stride * element_bytes, kEpilogueColumns * element_bytes);
  };
  const int64_t out_bytes = p.output == GemmOutput::kInt8                                   ? 1
                            : p.output == GemmOutput::kF16 || p.output == GemmOutput::kBF16 ? 2
                                                                                            : 4;
  const int64_t residual_bytes = p.residual_dtype == DType::kF32 ? 4 : 2;
  return p.n % kEpilogueColumns == 0 && fits(p.out, p.n, out_bytes) &&
         fits(p.residual, p.residual_stride_row, residual_bytes) && fits(p.scales.b_scale, 0, 4) &&
         fits(p.scales.bias, 0, 4) && fits(p.scales.acc_offset, 0, 4) && fits(p.out_scale, 0, 4) &&
         fits(p.out_zero_point, 0, 4);
}

template <int32_t kRowTiles>
Status launch_small(const AlignedOperands& p, const GemmEpilogueParams& epilogue, Stream stream) {
  using T = SmallGemmTraits;
  const int64_t blocks = ceil_div(p.n, T::kColumns) * ceil_div(p.m, kRowTiles * T::kRowTile);
  if (blocks > INT32_MAX) return Status::unsupported("expected fewer than 2^31 blocks");
  const int32_t threads = small_gemm_warps(p.k) * kWarpSize;
  gemm_small_kernel<kRowTiles>
      <<<static_cast<uint32_t>(blocks), threads, 0, to_cuda(stream)>>>(p, epilogue);
  return check_launch();
}

template <int32_t... kTiles>
Status launch_tile(int32_t tile, const GemmTileParams& p, Stream stream,
                   std::integer_sequence<int32_t, kTiles...>) {
  Status status = Status::unsupported("expected a tile of kGemmTiles");
  static_cast<void>(
      ((tile == kTiles && (status = launch_gemm_tile<kTiles>(p, stream), true)) || ...));
  return status;
}

Status launch_sm80(const GemmPlan& plan, const AlignedOperands& operands,
                   const GemmEpilogueParams& epilogue, int8_t* workspace, Stream stream) {
  GemmTileParams p{operands, epilogue, plan.splits, plan.depth_per_split, nullptr, nullptr};
  if (plan.splits > 1) {
    int8_t* const partials = workspace + plan.a_bytes;
    int8_t* const arrivals = partials + plan.partial_bytes;
    p.partials = reinterpret_cast<int32_t*>(partials);
    p.arrivals = reinterpret_cast<uint32_t*>(arrivals);
    const Status zeroed = to_status(
        cudaMemsetAsync(arrivals, 0, static_cast<size_t>(plan.arrival_bytes), to_cuda(stream)));
    if (!zeroed.is_ok()) return zeroed;
  }
  return launch_tile(plan.tile, p, stream, std::make_integer_sequence<int32_t, kNumGemmTiles>());
}

// The operands as every kernel reads them: a is copied first where it has to be.
Status align_operands(const GemmPlan& plan, const GemmOperands& given, Stream stream,
                      AlignedOperands* p) {
  *p = {given.m, given.n,     round_up(given.k, kGemmDepthMultiple), given.a_stride_row,
        given.a, given.packed};
  if (plan.copies_a) {
    p->a = given.workspace;
    p->a_stride_row = p->k;
    return copy_rows(
        {given.m, given.k, given.m, p->k, given.a_stride_row, given.a, given.workspace}, stream);
  }
  if (p->m == 1) p->a_stride_row = p->k;  // of no effect, hence free to be anything
  return Status::ok();
}

Status run(const GemmOperands& given, GemmEpilogueParams epilogue, Stream stream) {
  const Status checked = check_operands(given, epilogue.scales.acc_offset);
  if (!checked.is_ok() || given.m == 0 || given.n == 0) return checked;
  const GemmPlan plan = plan_gemm(given);
  if (!plan.status.is_ok()) return plan.status;
  AlignedOperands p;
  const Status aligned = align_operands(plan, given, stream, &p);
  if (!aligned.is_ok()) return aligned;
  epilogue.m = p.m;
  epilogue.n = p.n;
  epilogue.has_vector_columns = has_vector_columns(epilogue);
  switch (plan.path) {
    case GemmPath::kSm80:
      return launch_sm80(plan, p, epilogue, given.workspace, stream);
    case GemmPath::kSm90:
      return launch_gemm_sm90(p, epilogue, stream);
    default:
      static_assert(kMaxGemvRows == 2 * SmallGemmTraits::kRowTile, "which a block takes at once");
      return p.m <= SmallGemmTraits::kRowTile ? launch_small<1>(p, epilogue, stream)
                                              : launch_small<2>(p, epilogue, stream);
  }
}

}  // namespace

int64_t gemm_workspace_bytes(const GemmOperands& p) { return plan_gemm(p).workspace_bytes(); }

Status pack_gemm_weight(const PackGemmWeightParams& p, Stream stream) {
  if (p.k > kMaxK)
    return Status::unsupported("expected K of at most 131072, beyond which int32 sums overflow");
  return copy_rows({p.n, p.k, round_up(p.n, kGemmColumnMultiple), round_up(p.k, kGemmDepthMultiple),
                    p.weight_stride_row, p.weight, p.packed},
                   stream);
}

Status gemm(const GemmParams& p, Stream stream) {
  GemmEpilogueParams epilogue;
  epilogue.output = GemmOutput::kAcc;
  epilogue.out = p.acc;
  return run(p.operands, epilogue, stream);
}

Status gemm_dequantize(const GemmDequantizeParams& p, Stream stream) {
  GemmEpilogueParams epilogue;
  switch (p.out_dtype) {
    case DType::kF32:
      epilogue.output = GemmOutput::kF32;
      break;
    case DType::kF16:
      epilogue.output = GemmOutput::kF16;
      break;
    case DType::kBF16:
      epilogue.output = GemmOutput::kBF16;
      break;
    default:
      return Status::unsupported("expected float32, float16 or bfloat16 as output");
  }
  if (p.residual != nullptr && p.residual_dtype == DType::kI8)
    return Status::unsupported("expected a residual of float32, float16 or bfloat16");
  epilogue.scales = p.scales;
  epilogue.residual_dtype = p.residual_dtype;
  epilogue.residual_stride_row = p.residual_stride_row;
  epilogue.residual = p.residual;
  epilogue.out = p.out;
  return run(p.operands, epilogue, stream);
}

Status gemm_requantize(const GemmRequantizeParams& p, Stream stream) {
  GemmEpilogueParams epilogue;
  epilogue.output = GemmOutput::kInt8;
  epilogue.scales = p.scales;
  epilogue.out_scale = p.out_scale;
  epilogue.out_zero_point = p.out_zero_point;
  epilogue.out = p.q;
  return run(p.operands, epilogue, stream);
}

}  // namespace mambaquant::cuda
