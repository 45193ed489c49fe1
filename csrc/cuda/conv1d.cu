// Launcher of causal_conv1d_quantize.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/conv1d_kernel.cuh"

namespace mambaquant::cuda {

namespace {

constexpr int64_t kMaxGridY = 65535;
// Tokens of one sequence that a warp walks: enough to pay for the tokens before them, few enough that large
// work still comes in more blocks than there are multiprocessors.
constexpr int64_t kMinChunk = kTokensInFlight;
constexpr int64_t kMaxShare = 128;
// A token of an update moves 8 bytes a channel and the parameters 24: with 60 tokens a block they cost 5 %.
constexpr int64_t kMinShare = 5;

bool fits(const CausalConv1dQuantizeParams& p, int64_t vec) {
  return p.dim % vec == 0 && is_aligned(p.x, p.x_stride_token, vec) &&
         p.x_stride_batch % vec == 0 && is_aligned(p.q, 0, vec) &&
         is_aligned(p.initial_state, 0, vec) && is_aligned(p.final_state, 0, vec);
}

// Cuts the batch so that every multiprocessor gets a block of kConvWarps warps, if there is so much work:
// long sequences into chunks, a chunk a warp; short ones whole, several a warp.
ConvPlan make_plan(const CausalConv1dQuantizeParams& p, int64_t tiles) {
  const int64_t warps = std::max<int64_t>(multiprocessor_count(), 1) * kConvWarps;
  // Tokens a warp.
  const int64_t share =
      std::clamp<int64_t>(ceil_div(p.batch * p.seqlen * tiles, warps), 1, kMaxShare);
  const int64_t chunk = std::max(share, kMinChunk);
  // In place, a sequence's last chunk would overwrite what its first one reads.
  const bool in_place = p.initial_state == p.final_state;
  ConvPlan plan;
  plan.tokens_per_chunk = p.seqlen;
  if (p.seqlen > chunk && !in_place) {
    plan.tokens_per_chunk = (chunk + kTokensInFlight / 2) / kTokensInFlight * kTokensInFlight;
    plan.chunks = ceil_div(p.seqlen, plan.tokens_per_chunk);
  } else if (p.seqlen > 0) {
    // One block suffices for a small batch; a larger one gives warps kMinShare tokens at least.
    const int64_t one_block = ceil_div(p.batch, kConvWarps) * p.seqlen;
    const int64_t tokens = std::max(share, std::min(kMinShare, one_block));
    plan.pieces_per_warp = std::max<int64_t>(tokens / p.seqlen, 1);
  }
  plan.pieces = p.batch * plan.chunks;
  const int64_t least = ceil_div(plan.pieces, kMaxGridY * kConvWarps);
  plan.pieces_per_warp = std::max(plan.pieces_per_warp, least);
  return plan;
}

template <int32_t kVec>
Status launch(const CausalConv1dQuantizeParams& p, Stream stream) {
  const int64_t tiles = ceil_div(p.dim, kVec * kWarpSize);
  const ConvPlan plan = make_plan(p, tiles);
  const int64_t warps = ceil_div(plan.pieces, plan.pieces_per_warp);
  const int64_t slices = ceil_div(warps, kConvWarps);
  const int64_t block_warps = ceil_div(warps, slices);
  const dim3 grid(static_cast<uint32_t>(tiles), static_cast<uint32_t>(slices));
  const dim3 block(kWarpSize, static_cast<uint32_t>(block_warps));
  if (p.order == nullptr) {
    conv1d_kernel<kVec, false><<<grid, block, 0, to_cuda(stream)>>>(p, plan);
  } else {
    conv1d_kernel<kVec, true><<<grid, block, 0, to_cuda(stream)>>>(p, plan);
  }
  return check_launch();
}

}  // namespace

Status causal_conv1d_quantize(const CausalConv1dQuantizeParams& p, Stream stream) {
  if (p.width < 2 || p.width > kWindow) {
    return Status::unsupported("expected weight of width 2, 3 or 4");
  }
  if (p.batch == 0 || p.dim == 0) return Status::ok();
  return fits(p, 4) ? launch<4>(p, stream) : launch<1>(p, stream);
}

}  // namespace mambaquant::cuda
