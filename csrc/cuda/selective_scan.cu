// Launchers of selective_scan: which kernel, and how a sequence is split.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/selective_scan_any_kernel.cuh"
#include "cuda/selective_scan_kernel.cuh"
#include "cuda/selective_scan_update_kernel.cuh"

namespace mambaquant::cuda {

namespace {

constexpr int32_t kChunksPerBlock = 4;
constexpr int64_t kTilesPerSm = 2;                   // from which on sequences stay whole
constexpr int32_t kMinChunkTokens = 16;              // chosen; a caller may ask for less
constexpr int32_t kMaxChunkTokens = kMaxTileTokens;  // 256 a block
constexpr int32_t kSequenceTokens = kMaxTileTokens;  // where a block walks the whole sequence
constexpr int64_t kTwoBlocksMin =
    96 * 1024;  // bytes of half an SM, below which one larger block serves better
constexpr int64_t kMaxGrid = 0x7fffffff;
constexpr int64_t kMaxRoutedTokens = 0x7fffffff;  // a tile's tokens are 32-bit

bool fits_vectors(const void* base, DType dtype, int64_t stride_batch, int64_t stride_token) {
  const int64_t size = element_bytes(dtype);
  return is_aligned(base, stride_token * size, 4 * size) && stride_batch % 4 == 0;
}

uint32_t vector_operands(const SelectiveScanParams& p) {
  uint32_t vectors = 0;
  const auto add = [&](VectorOperand operand, bool fits) { vectors |= fits ? operand : 0u; };
  add(kVectorX, fits_vectors(p.x, DType::kI8, p.x_stride_batch, p.x_stride_token));
  add(kVectorDt, fits_vectors(p.dt, p.dt_dtype, p.dt_stride_batch, p.dt_stride_token));
  add(kVectorZ, p.z == nullptr || fits_vectors(p.z, p.z_dtype, p.z_stride_batch, p.z_stride_token));
  add(kVectorAddend,
      p.addend == nullptr ||
          fits_vectors(p.addend, p.addend_dtype, p.addend_stride_batch, p.addend_stride_token));
  add(kVectorY, fits_vectors(p.y, p.y_dtype, 0, p.dim));
  add(kVectorB, fits_vectors(p.B, p.B_dtype, p.B_stride_batch, p.B_stride_token));
  add(kVectorC, fits_vectors(p.C, p.C_dtype, p.C_stride_batch, p.C_stride_token));
  return vectors;
}

Readout readout_of(const SelectiveScanParams& p) {
  return p.readout_scale == nullptr ? Readout::kFloat
         : p.rotate_state           ? Readout::kRotatedInt8
                                    : Readout::kInt8;
}

bool is_routed(const SelectiveScanParams& p) { return p.order != nullptr || p.addend != nullptr; }

// With room for an order: chunks, and so the bits of a result, do not depend on whether there is one.
int64_t shared_bytes(const SelectiveScanParams& p, int32_t chunks, int32_t groups) {
  return p.readout_scale == nullptr ? scan_shared_bytes<Readout::kFloat, true>(chunks, groups)
                                    : scan_shared_bytes<Readout::kInt8, true>(chunks, groups);
}

// The longest chunk, up to kMaxChunkTokens, with which two blocks share an SM or, on a small one, one fits.
int32_t max_chunk_tokens(const SelectiveScanParams& p) {
  const int64_t half = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                       device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int64_t block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t bytes = half >= kTwoBlocksMin ? half : block;
  int32_t tokens = kMaxChunkTokens;
  while (tokens > kGroup && shared_bytes(p, kChunksPerBlock, tokens / kGroup) > bytes)
    tokens -= kGroup;
  return tokens;
}

bool is_split(const SelectiveScanParams& p) {
  return p.dstate == kStates && p.chunk_size < p.seqlen;
}

ScanPlan make_plan(const SelectiveScanParams& p) {
  ScanPlan plan;
  plan.tiles = ceil_div(p.dim, kTileChannels);
  plan.vectors = vector_operands(p);
  plan.blocks = 1;
  plan.chunk_tokens = kSequenceTokens;
  if (is_split(p)) {
    const int64_t longest = max_chunk_tokens(p);
    plan.chunk_tokens = static_cast<int32_t>(p.chunk_size < longest ? p.chunk_size : longest);
    plan.blocks = ceil_div(p.seqlen, kChunksPerBlock * plan.chunk_tokens);
  }
  plan.groups = static_cast<int32_t>(ceil_div(plan.chunk_tokens, kGroup));
  return plan;
}

// Bytes of the ticket counter and the flags, before the states.
int64_t flag_bytes(int64_t blocks) {
  return ceil_div(blocks + 1, 32) * 32 * static_cast<int64_t>(sizeof(uint32_t));
}

template <Readout kReadout, int32_t kChunks, bool kRouted>
Status launch_scan(const SelectiveScanParams& p, const ScanPlan& plan, Stream stream) {
  const int64_t blocks = p.batch * plan.tiles * plan.blocks;
  if (blocks > kMaxGrid)
    return Status::unsupported("expected at most 2^31 - 1 blocks of tokens and channels");
  ScanChain chain{};
  if (plan.blocks > 1) {
    chain.ticket = reinterpret_cast<uint32_t*>(p.workspace);
    chain.flags = chain.ticket + 1;
    chain.states = p.workspace + flag_bytes(blocks) / static_cast<int64_t>(sizeof(float));
    const Status status = to_status(
        cudaMemsetAsync(chain.ticket, 0, static_cast<size_t>(flag_bytes(blocks)), to_cuda(stream)));
    if (!status.is_ok()) return status;
  }
  const int64_t bytes = scan_shared_bytes<kReadout, kRouted>(kChunks, plan.groups);
  const auto kernel = scan_kernel<kReadout, kChunks, kRouted>;
  const Status status = allow_shared_memory(kernel, bytes);
  if (!status.is_ok()) return status;
  kernel<<<static_cast<uint32_t>(blocks), kTileChannels * kChunks, static_cast<size_t>(bytes),
           to_cuda(stream)>>>(p, plan, chain);
  return check_launch();
}

template <Readout kReadout>
Status launch_update(const SelectiveScanParams& p, Stream stream) {
  const int64_t tiles = ceil_div(p.dim, kUpdateThreads);
  // A thread keeps A for several sequences once there are enough threads to fill the device.
  const int64_t wanted = std::max(multiprocessor_count(), 1) * int64_t{kUpdateBlocksPerSm};
  const int64_t sequences = p.batch * tiles > wanted ? ceil_div(p.batch * tiles, wanted) : 1;
  const int64_t blocks = tiles * ceil_div(p.batch, sequences);
  if (blocks > kMaxGrid) return Status::unsupported("expected at most 2^31 - 1 blocks of channels");
  update_kernel<kReadout><<<static_cast<uint32_t>(blocks), kUpdateThreads, 0, to_cuda(stream)>>>(
      p, static_cast<int32_t>(sequences));
  return check_launch();
}

template <int32_t kPerLane>
Status launch_any(const SelectiveScanParams& p, Stream stream) {
  int32_t lanes = 1;
  while (lanes * kPerLane < p.dstate) lanes *= 2;
  const int64_t blocks = ceil_div(p.batch * p.dim * lanes, kAnyThreads);
  if (blocks > kMaxGrid) return Status::unsupported("expected at most 2^31 - 1 blocks of channels");
  scan_any_kernel<kPerLane>
      <<<static_cast<uint32_t>(blocks), kAnyThreads, 0, to_cuda(stream)>>>(p, lanes);
  return check_launch();
}

template <Readout kReadout, bool kRouted>
Status launch_tiles(const SelectiveScanParams& p, Stream stream) {
  const ScanPlan plan = make_plan(p);
  return is_split(p) ? launch_scan<kReadout, kChunksPerBlock, kRouted>(p, plan, stream)
                     : launch_scan<kReadout, 1, kRouted>(p, plan, stream);
}

template <Readout kReadout>
Status launch_readout(const SelectiveScanParams& p, Stream stream) {
  if (is_routed(p)) return launch_tiles<kReadout, true>(p, stream);
  if (p.seqlen == 1) return launch_update<kReadout>(p, stream);
  return launch_tiles<kReadout, false>(p, stream);
}

// No tokens: the state passes through.
Status copy_state(const SelectiveScanParams& p, Stream stream) {
  const auto bytes = static_cast<size_t>(p.batch * p.dstate * p.dim) * sizeof(float);
  if (p.initial_state == p.final_state) return Status::ok();
  if (p.initial_state == nullptr)
    return to_status(cudaMemsetAsync(p.final_state, 0, bytes, to_cuda(stream)));
  return to_status(cudaMemcpyAsync(p.final_state, p.initial_state, bytes, cudaMemcpyDeviceToDevice,
                                   to_cuda(stream)));
}

// Walking backwards is walking forwards with the strides turned round; the kernels turn y. Where tokens are
// looked up, that turns them.
void reverse_inputs(SelectiveScanParams* p) {
  const auto turn = [&](const void* base, DType dtype, int64_t* stride) -> const void* {
    const int64_t last = (p->seqlen - 1) * *stride * element_bytes(dtype);
    *stride = -*stride;
    return base == nullptr ? nullptr : static_cast<const char*>(base) + last;
  };
  p->x = static_cast<const int8_t*>(turn(p->x, DType::kI8, &p->x_stride_token));
  p->dt = turn(p->dt, p->dt_dtype, &p->dt_stride_token);
  p->B = turn(p->B, p->B_dtype, &p->B_stride_token);
  p->C = turn(p->C, p->C_dtype, &p->C_stride_token);
  p->z = turn(p->z, p->z_dtype, &p->z_stride_token);
}

}  // namespace

// Where a block walks a whole sequence it spends 15 instructions on what costs 20 in a split one; it needs
// two tiles an SM, that is a warp for each scheduler, to make up for that. Chunks are as long as fit, so that
// a block's scales and states weigh little beside its tokens, and equal.
int64_t selective_scan_chunk_size(const SelectiveScanParams& p) {
  if (p.seqlen <= 0) return 1;
  const int64_t tiles = p.batch * ceil_div(p.dim, kTileChannels);
  if (p.dstate != kStates || tiles >= kTilesPerSm * multiprocessor_count()) return p.seqlen;
  const int64_t blocks = ceil_div(p.seqlen, kChunksPerBlock * max_chunk_tokens(p));
  const int64_t tokens = ceil_div(ceil_div(p.seqlen, kChunksPerBlock * blocks), kGroup) * kGroup;
  return tokens < kMinChunkTokens ? kMinChunkTokens : tokens;
}

int64_t selective_scan_workspace_bytes(const SelectiveScanParams& p) {
  if (p.seqlen <= 1 || !is_split(p)) return 0;
  const ScanPlan plan = make_plan(p);
  if (plan.blocks == 1) return 0;
  const int64_t blocks = p.batch * plan.tiles * plan.blocks;
  return flag_bytes(blocks) + blocks * kTileStates * static_cast<int64_t>(sizeof(float));
}

Status selective_scan(const SelectiveScanParams& params, Stream stream) {
  SelectiveScanParams p = params;
  if (p.dstate < 1 || p.dstate > kMaxDState)
    return Status::unsupported("expected dstate from 1 to 256");
  if (p.chunk_size <= 0) return Status::unsupported("expected a chunk_size of 1 or more");
  if (p.batch == 0 || p.dim == 0) return Status::ok();
  if (p.seqlen == 0) return copy_state(p, stream);
  if (is_routed(p) && p.seqlen > kMaxRoutedTokens)
    return Status::unsupported("expected at most 2^31 - 1 tokens with an order or an addend");
  if (p.dstate != kStates) {
    // Eight states a lane where there are so many, up to 32 lanes.
    if (p.dstate == 1) return launch_any<1>(p, stream);
    if (p.dstate == 2) return launch_any<2>(p, stream);
    return p.dstate <= 4 ? launch_any<4>(p, stream) : launch_any<8>(p, stream);
  }
  if (p.reverse && !is_routed(p)) reverse_inputs(&p);
  switch (readout_of(p)) {
    case Readout::kFloat:
      return launch_readout<Readout::kFloat>(p, stream);
    case Readout::kInt8:
      return launch_readout<Readout::kInt8>(p, stream);
    default:
      return launch_readout<Readout::kRotatedInt8>(p, stream);
  }
}

}  // namespace mambaquant::cuda
