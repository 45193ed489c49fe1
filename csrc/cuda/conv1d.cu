// Launcher of causal_conv1d_quantize.
#include "cuda/common/launch.h"
#include "cuda/conv1d_kernel.cuh"

namespace mambaquant::cuda {

namespace {

constexpr int64_t kMaxGridY = 65535;
// Tokens of a chunk: enough to pay for the tokens before it, few enough to leave work for other warps.
constexpr int64_t kMinChunk = kTokensInFlight;
constexpr int64_t kMaxChunk = 128;
// A token of an update moves 8 bytes a channel and the parameters 24: with 60 tokens a block they cost 5 %.
constexpr int64_t kMinTokens = 5;  // of a warp

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

bool fits(const CausalConv1dQuantizeParams& p, int64_t vec) {
  return p.dim % vec == 0 && is_aligned(p.x, p.x_stride_token, vec) &&
         p.x_stride_batch % vec == 0 && is_aligned(p.q, 0, vec) &&
         is_aligned(p.initial_state, 0, vec) && is_aligned(p.final_state, 0, vec);
}

// Cuts batch * seqlen tokens so that every multiprocessor gets a block of kConvWarps warps if there is
// work for it, and a warp no more than kMaxChunk tokens of one sequence.
ConvPlan make_plan(const CausalConv1dQuantizeParams& p, int64_t tiles) {
  const int64_t warps = larger(multiprocessor_count(), 1) * kConvWarps;
  const int64_t share = larger(ceil_div(p.batch * p.seqlen * tiles, warps), 1);  // tokens a warp
  ConvPlan plan;
  plan.tokens_per_chunk = p.seqlen;
  // In place, a sequence's last chunk would overwrite what its first one reads.
  const bool in_place = p.initial_state == p.final_state;
  if (!in_place && p.seqlen > larger(share, kMinChunk)) {
    const int64_t wanted = smaller(larger(share, kMinChunk), kMaxChunk);
    const int64_t rounded = (wanted + kTokensInFlight / 2) / kTokensInFlight * kTokensInFlight;
    plan.tokens_per_chunk = rounded;
    plan.chunks = ceil_div(p.seqlen, rounded);
  } else if (p.seqlen > 0) {
    const int64_t balanced = ceil_div(p.batch, kConvWarps);
    plan.pieces_per_warp = larger(share, smaller(kMinTokens, balanced * p.seqlen)) / p.seqlen;
    plan.pieces_per_warp = larger(plan.pieces_per_warp, 1);
  }
  plan.pieces = p.batch * plan.chunks;
  const int64_t needed = ceil_div(plan.pieces, kMaxGridY * kConvWarps);
  plan.pieces_per_warp = larger(plan.pieces_per_warp, needed);
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
  conv1d_kernel<kVec><<<grid, block, 0, to_cuda(stream)>>>(p, plan);
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
