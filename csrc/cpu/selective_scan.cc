// selective_scan. The recurrence h = exp(dt A) h + (dt x) B per channel and state, its read-out and
// its gate: who computes which block (selective_scan_block.h says how, and what bounds it).
//
// A task owns a range of channel vectors of one sequence and walks it in blocks of up to 32 tokens.
// Per block, B and C become float32 once for all its channels. All steps work lane by lane and token
// by token, so that neither block borders nor the split into tasks change a bit.
//
// Chunks (chunk_size < seqlen): pass 1 scans every chunk from state 0; the decay over a whole chunk
// is exp(A * sum dt), one exp per state. Pass 2 carries the states over the chunks, pass 3 scans
// again.
#include "cpu/selective_scan_block.h"

#include "cpu/kernels.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kTokenVectorsPerThread = 128;  // about 10 us of work

// Channels [c_begin, c_end) of one sequence over tokens [begin, end).
struct Stretch {
  int64_t batch, begin, end, c_begin, c_end;
  const float* state_in;  // (dstate, dim) or null
  float* state_out;       // (dstate, dim)
  float* dt_sum;          // (dim,): pass 1, no read-out; null: write y
};

int64_t size_of(DType dtype) { return dtype == DType::kI8 ? 1 : dtype == DType::kF32 ? 4 : 2; }

const void* element(const void* p, DType dtype, int64_t index) {
  return static_cast<const char*>(p) + index * size_of(dtype);
}

void find_tokens(const SelectiveScanParams& p, TokenBlock* block) {
  for (int64_t i = 0; i < block->tokens; ++i) {
    const int64_t t = p.reverse ? p.seqlen - 1 - (block->begin + i) : block->begin + i;
    block->token[i] = p.order == nullptr ? t : p.order[t];
  }
}

void add_steps(const TokenBlock& block, const ChannelBlock& b, bool is_first, float* dt_sum) {
  const int64_t n = b.c_end - b.c;
  F32 sum = is_first ? set1(0.0f) : load_up_to(dt_sum + b.c, n);
  for (int64_t t = 0; t < block.tokens; ++t) sum = sum + b.dt[t];
  store_up_to(dt_sum + b.c, sum, n);
}

// NOTE(prefetch): a vector of channels reads one line of every token's row. Rows lie further apart
// than the hardware prefetchers look, so that each such line would be waited for; the scan has
// instruction slots to spare and fetches the lines of the next vector meanwhile.
void aim_ahead(const SelectiveScanParams& p, const TokenBlock& block, int64_t c, ChannelBlock* b) {
  const auto column = [&](const void* base, DType dtype, int64_t stride_batch,
                          int64_t stride_token) {
    const void* first = element(base, dtype, block.batch * stride_batch + c);
    return Column{static_cast<const char*>(first), stride_token * size_of(dtype)};
  };
  b->ahead[0] = column(p.x, DType::kI8, p.x_stride_batch, p.x_stride_token);
  b->ahead[1] = column(p.dt, p.dt_dtype, p.dt_stride_batch, p.dt_stride_token);
  b->ahead[2] =
      p.z == nullptr ? b->ahead[1] : column(p.z, p.z_dtype, p.z_stride_batch, p.z_stride_token);
  b->ahead[3] = column(p.y, p.y_dtype, p.seqlen * p.dim, p.dim);
}

// What scan_vectors finds fetched when it begins.
void fetch_first_states(const SelectiveScanParams& p, const Stretch& s) {
  const float* const source = s.state_in == nullptr ? s.state_out : s.state_in;
  for (int64_t n = 0; n < p.dstate; ++n) {
    for (int64_t v = 0; v < kVectorsAhead; ++v) {
      fetch_states(p, source, n, s.c_begin + v * kLanes);
    }
  }
}

void run_stretch(const SelectiveScanParams& p, const Loops& loops, const Stretch& s) {
  const int64_t block_tokens = smaller(kBlockTokens, kBlockStates / p.dstate);
  TokenBlock block;
  ChannelBlock b;
  block.batch = s.batch;
  if (s.end - s.begin == 1) fetch_first_states(p, s);
  for (block.begin = s.begin; block.begin < s.end; block.begin += block_tokens) {
    block.tokens = smaller(block_tokens, s.end - block.begin);
    find_tokens(p, &block);
    const bool is_read = s.dt_sum == nullptr;
    loops.convert_B(p, &block);
    if (is_read) loops.convert_C(p, &block);
    const bool is_first = block.begin == s.begin;
    const float* state_in = is_first ? s.state_in : s.state_out;
    for (b.c = s.c_begin; b.c < s.c_end; b.c = b.c_end) {
      const bool by_vector = block.tokens == 1 && is_read && s.c_end - b.c >= kLanes;
      b.vectors = by_vector ? smaller(kBlockTokens, (s.c_end - b.c) / kLanes) : 1;
      b.c_end = smaller(b.c + b.vectors * kLanes, s.c_end);
      loops.prepare(p, block, &b);
      aim_ahead(p, block, b.c_end, &b);
      if (!is_read) {
        loops.scan_without_readout(p, block, state_in, s.state_out, &b);
        add_steps(block, b, is_first, s.dt_sum);
        continue;
      }
      const auto scan = by_vector ? loops.scan_vectors : loops.scan_tokens;
      scan(p, block, state_in, s.state_out, &b);
      if (p.addend != nullptr) loops.add(p, block, &b);
      loops.finish(p, block, b);
    }
  }
}

// Calls f(item, c_begin, c_end) for items [0, items), each with the whole or a part of its
// channels.
template <typename F>
void for_items(const SelectiveScanParams& p, const Threads& threads, int64_t items, int64_t tokens,
               const F& f) {
  const int64_t vectors = (p.dim + kLanes - 1) / kLanes;
  const int64_t grain = kTokenVectorsPerThread / (tokens + 1) + 1;
  threads.parallel_for(items * vectors, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t item = first / vectors;
      const int64_t stop = smaller(last, (item + 1) * vectors);
      const int64_t c_end = smaller((stop - item * vectors) * kLanes, p.dim);
      f(item, (first - item * vectors) * kLanes, c_end);
      first = stop;
    }
  });
}

struct Chunks {
  int64_t count, size;
  float* state;   // (batch, count, dstate, dim): a chunk's local end state, then its initial state
  float* dt_sum;  // (batch, count, dim)
};

// Pass 2. The last chunk was not scanned: its local state and sum are never read.
void carry_states(const SelectiveScanParams& p, const Chunks& chunks, int64_t batch,
                  int64_t c_begin, int64_t c_end) {
  const int64_t states = p.dstate * p.dim;
  for (int64_t c = c_begin; c < c_end; c += kLanes) {
    const int64_t n = smaller(kLanes, c_end - c);
    for (int64_t s = 0; s < p.dstate; ++s) {
      const int64_t row = s * p.dim + c;
      const F32 A = load_up_to(p.A + row, n);
      F32 h = load_or(p.initial_state, batch * states + row, n, 0.0f);
      for (int64_t k = 0; k < chunks.count; ++k) {
        float* slot = chunks.state + (batch * chunks.count + k) * states + row;
        if (k + 1 < chunks.count) {
          const F32 dt_sum = load_up_to(chunks.dt_sum + (batch * chunks.count + k) * p.dim + c, n);
          const Exp2 decay = exp2_product(dt_sum * set1(kLog2E), A);
          const F32 next = fma(h * decay.steps, decay.rest, load_up_to(slot, n));
          store_up_to(slot, h, n);
          h = next;
        } else {
          store_up_to(slot, h, n);
        }
      }
    }
  }
}

void scan_chunks(const SelectiveScanParams& p, const Loops& loops, const Threads& threads) {
  Chunks chunks;
  chunks.size = p.chunk_size;
  chunks.count = (p.seqlen + p.chunk_size - 1) / p.chunk_size;
  chunks.state = p.workspace;
  chunks.dt_sum = p.workspace + p.batch * chunks.count * p.dstate * p.dim;
  const auto stretch_of = [&](int64_t item, int64_t c_begin, int64_t c_end) {
    const int64_t begin = item % chunks.count * chunks.size;
    float* state = chunks.state + item * p.dstate * p.dim;
    return Stretch{item / chunks.count,
                   begin,
                   smaller(begin + chunks.size, p.seqlen),
                   c_begin,
                   c_end,
                   state,
                   state,
                   nullptr};
  };
  const int64_t items = p.batch * chunks.count;
  for_items(p, threads, items, chunks.size, [&](int64_t item, int64_t c_begin, int64_t c_end) {
    if (item % chunks.count == chunks.count - 1) return;
    Stretch s = stretch_of(item, c_begin, c_end);
    s.state_in = nullptr;
    s.dt_sum = chunks.dt_sum + item * p.dim;
    run_stretch(p, loops, s);
  });
  for_items(p, threads, p.batch, chunks.count, [&](int64_t batch, int64_t c_begin, int64_t c_end) {
    carry_states(p, chunks, batch, c_begin, c_end);
  });
  for_items(p, threads, items, chunks.size, [&](int64_t item, int64_t c_begin, int64_t c_end) {
    Stretch s = stretch_of(item, c_begin, c_end);
    if (s.end == p.seqlen) s.state_out = p.final_state + s.batch * p.dstate * p.dim;
    run_stretch(p, loops, s);
  });
}

// No tokens: the state passes through.
void copy_state(const SelectiveScanParams& p) {
  const int64_t count = p.batch * p.dstate * p.dim;
  for (int64_t i = 0; i < count; ++i) {
    p.final_state[i] = p.initial_state == nullptr ? 0.0f : p.initial_state[i];
  }
}

}  // namespace

Status selective_scan(const SelectiveScanParams& p, const Threads& threads) {
  if (p.dstate > kMaxDState) return Status::unsupported("expected dstate of at most 256");
  Loops loops;
  const Status status = choose_loops(p, &loops);
  if (!status.is_ok()) return status;
  if (p.seqlen == 0) {
    copy_state(p);
    return Status::ok();
  }
  if (p.chunk_size < p.seqlen) {
    scan_chunks(p, loops, threads);
    return Status::ok();
  }
  for_items(p, threads, p.batch, p.seqlen, [&](int64_t batch, int64_t c_begin, int64_t c_end) {
    const int64_t offset = batch * p.dstate * p.dim;
    const float* state_in = p.initial_state == nullptr ? nullptr : p.initial_state + offset;
    run_stretch(p, loops,
                {batch, 0, p.seqlen, c_begin, c_end, state_in, p.final_state + offset, nullptr});
  });
  return Status::ok();
}

}  // namespace mambaquant::cpu::MBQ_ISA
