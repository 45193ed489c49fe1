// How selective_scan splits a sequence. Compiled once, not per ISA, so that the answer does not
// depend on it.
#include "mambaquant/selective_scan.h"

namespace mambaquant::cpu {

namespace {

constexpr int64_t kPlanLanes = 16;     // channels that one thread takes at least
constexpr int64_t kMinChunkSize = 64;  // tokens; below, starting a chunk costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// Chunks cost a second pass over the recurrence (all but its read-out), about 1.8 times the work:
// they pay where the channels of all sequences fill at most half of the threads.
int64_t selective_scan_chunk_size(const SelectiveScanParams& p, int64_t num_threads) {
  const int64_t seqlen = p.seqlen > 0 ? p.seqlen : 1;
  const int64_t channel_tasks = p.batch * ceil_div(p.dim, kPlanLanes);
  if (channel_tasks == 0 || 2 * channel_tasks > num_threads) return seqlen;
  const int64_t chunk_size = ceil_div(seqlen, num_threads / channel_tasks);
  return chunk_size < kMinChunkSize ? kMinChunkSize : chunk_size;
}

// Per chunk: its local end state, then its initial state (dstate, dim), and the sum of its steps
// (dim,).
int64_t selective_scan_workspace_bytes(const SelectiveScanParams& p) {
  if (p.seqlen <= p.chunk_size) return 0;
  const int64_t chunks = ceil_div(p.seqlen, p.chunk_size);
  return p.batch * chunks * (p.dstate + 1) * p.dim * static_cast<int64_t>(sizeof(float));
}

}  // namespace mambaquant::cpu
