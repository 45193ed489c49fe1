// language_model: which kernel runs on what, in which order. It computes nothing itself.
#include "mambaquant/language_model.h"

#include <cstring>

#include "cpu/team.h"
#include "mambaquant/conv1d.h"
#include "mambaquant/embedding.h"
#include "mambaquant/gemm.h"
#include "mambaquant/hadamard.h"
#include "mambaquant/norm.h"
#include "mambaquant/quantize.h"
#include "mambaquant/selective_scan.h"

namespace mambaquant::cpu {

namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts a workspace into arrays. With a null base it only measures.
class Arena {
 public:
  explicit Arena(int8_t* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    int8_t* const start = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(start);
  }
  int64_t used() const { return used_; }

 private:
  int8_t* base_;
  int64_t used_ = 0;
};

// How a call is cut: chunks of `steps` tokens of every sequence, and within a chunk blocks of
// `sequences` x `block_steps` tokens.
struct Cut {
  Cut(int64_t batch, int64_t seqlen) {
    steps = smaller(seqlen, larger(kChunkRows / batch, 1));
    block_steps = smaller(steps, kBlockRows);
    sequences = block_steps < steps ? 1 : smaller(batch, larger(kBlockRows / steps, 1));
  }
  int64_t chunk_rows(int64_t batch) const { return batch * steps; }
  int64_t block_rows() const { return sequences * block_steps; }

  int64_t steps, block_steps, sequences;
};

// The activations of a block of tokens. y may take the place of dt, whose values each scan task reads
// before it writes the same places, and int8 out that of x, which is last read by the scan.
struct Activations {
  Activations(const LanguageModel& m, const Cut& cut, int64_t batch, int64_t num_threads,
              Arena* arena) {
    const int64_t rows = cut.block_rows();
    stream = arena->take<float>(cut.chunk_rows(batch) * m.hidden);
    last = arena->take<float>(batch * m.hidden);
    ids = arena->take<int64_t>(cut.chunk_rows(batch));
    q = arena->take<int8_t>(larger(rows, batch) * m.hidden);
    xz = arena->take<int8_t>(rows * 2 * m.dim);
    x = arena->take<int8_t>(rows * m.dim);
    dtBC = arena->take<int8_t>(rows * (m.dt_rank + 2 * m.dstate));
    dt = arena->take<float>(rows * m.dim);
    conv_state = arena->take<int8_t>(cut.sequences * (m.width - 1) * m.dim);
    gemm = arena->take<int8_t>(
        gemm_workspace_bytes(larger(rows, batch), larger(m.hidden, m.dim), num_threads));
  }

  float *stream, *last;
  int64_t* ids;
  int8_t *q, *xz, *x, *dtBC;
  float* dt;
  int8_t *conv_state, *gemm;
};

// The kernels of one call, on one team.
class Runner {
 public:
  Runner(const LanguageModelParams& p, const Threads& threads)
      : p_(p),
        m_(*p.model),
        threads_(threads),
        cut_(p.batch, p.seqlen),
        arena_(p.workspace),
        act_(m_, cut_, p.batch, threads.num_threads, &arena_) {}

  Status run() {
    for (int64_t begin = 0; begin < p_.seqlen; begin += cut_.steps) {
      const int64_t steps = smaller(cut_.steps, p_.seqlen - begin);
      if (p_.ids != nullptr) {
        embed(begin, steps);
      } else {
        copy_rows(p_.x + begin * m_.hidden, p_.seqlen, act_.stream, steps, steps);
      }
      for (int64_t layer = 0; layer < m_.num_blocks; ++layer) run_layer(layer, steps);
      if (p_.y != nullptr) {
        copy_rows(act_.stream, steps, p_.y + begin * m_.hidden, p_.seqlen, steps);
      }
      if (begin + steps == p_.seqlen) {
        copy_rows(act_.stream + (steps - 1) * m_.hidden, steps, act_.last, 1, 1);
      }
    }
    if (p_.last != nullptr) copy_rows(act_.last, 1, p_.last, 1, 1);
    if (p_.logits != nullptr) run_head();
    return status_;
  }

 private:
  // The first failure is kept; a kernel that refuses has written nothing, and what follows is void.
  void note(const Status& status) {
    if (status_.is_ok()) status_ = status;
  }

  void embed(int64_t begin, int64_t steps) {
    for (int64_t b = 0; b < p_.batch; ++b) {
      std::memcpy(act_.ids + b * steps, p_.ids + b * p_.seqlen + begin,
                  static_cast<size_t>(steps) * sizeof(int64_t));
    }
    EmbeddingParams e;
    e.tokens = p_.batch * steps;
    e.dim = m_.hidden;
    e.table_dtype = m_.embedding_dtype;
    e.ids = act_.ids;
    e.table = m_.embedding;
    e.scale = m_.embedding_scale;
    e.out = act_.stream;
    note(embedding(e, threads_));
  }

  void run_layer(int64_t layer, int64_t steps) {
    for (int64_t first = 0; first < p_.batch; first += cut_.sequences) {
      const int64_t sequences = smaller(cut_.sequences, p_.batch - first);
      for (int64_t begin = 0; begin < steps; begin += cut_.block_steps) {
        run_block({layer, first, sequences, smaller(cut_.block_steps, steps - begin),
                   act_.stream + (first * steps + begin) * m_.hidden});
      }
    }
  }

  // Some tokens of some sequences, in one layer. Their rows of the stream lie side by side.
  struct Place {
    int64_t layer, first_sequence, sequences, steps;
    float* stream;  // (sequences * steps, hidden)

    int64_t rows() const { return sequences * steps; }
  };

  void run_block(const Place& at) {
    const LanguageBlock& block = m_.blocks[at.layer];
    norm(at.rows(), at.stream, block.norm_weight, block.norm_eps, block.in_scale);
    requantize(at.rows(), act_.q, block.in_proj, block.in_scale, block.xz_scale, act_.xz);
    convolve(at, block);
    requantize(at.rows(), act_.x, block.x_proj, block.one, block.dtBC_scale, act_.dtBC);
    dequantize(at.rows(), act_.dtBC, block.x_proj.n, block.dt_proj, block.dtBC_scale, nullptr,
               act_.dt);
    scan(at, block);
    round_out(at.rows(), block);
    dequantize(at.rows(), act_.x, m_.dim, block.out_proj, block.out_scale, at.stream, at.stream);
  }

  void norm(int64_t rows, const float* x, const float* weight, float eps, const float* scale) {
    NormQuantizeParams n;
    n.tokens = rows;
    n.dim = m_.hidden;
    n.x_stride_token = m_.hidden;
    n.eps = eps;
    n.x = x;
    n.weight = weight;
    n.scale = scale;
    n.q = act_.q;
    note(norm_quantize(n, threads_));
  }

  GemmOperands operands(int64_t rows, const int8_t* a, int64_t a_stride, const LinearWeight& w) {
    GemmOperands o;
    o.m = rows;
    o.n = w.n;
    o.k = w.k;
    o.a_stride_row = a_stride;
    o.a = a;
    o.packed = w.packed;
    o.workspace = act_.gemm;
    return o;
  }

  static GemmScales scales(const LinearWeight& w, const float* a_scale) {
    GemmScales s;
    s.a_scale = a_scale;
    s.b_scale = w.scale;
    s.acc_offset = w.acc_offset;
    s.bias = w.bias;
    return s;
  }

  void requantize(int64_t rows, const int8_t* a, const LinearWeight& w, const float* a_scale,
                  const float* out_scale, int8_t* q) {
    GemmRequantizeParams g;
    g.operands = operands(rows, a, w.k, w);
    g.scales = scales(w, a_scale);
    g.out_scale = out_scale;
    g.q = q;
    note(gemm_requantize(g, threads_));
  }

  void dequantize(int64_t rows, const int8_t* a, int64_t a_stride, const LinearWeight& w,
                  const float* a_scale, const float* residual, float* out) {
    GemmDequantizeParams g;
    g.operands = operands(rows, a, a_stride, w);
    g.scales = scales(w, a_scale);
    g.residual_stride_row = w.n;
    g.residual = residual;
    g.out = out;
    note(gemm_dequantize(g, threads_));
  }

  void convolve(const Place& at, const LanguageBlock& block) {
    const int64_t state_bytes = (m_.width - 1) * m_.dim;
    int8_t* const state = p_.conv_state + (at.layer * p_.batch + at.first_sequence) * state_bytes;
    CausalConv1dQuantizeParams c;
    c.dim = m_.dim;
    c.x_scale = block.xz_scale;
    c.weight_scale = block.conv_weight_scale;
    c.bias = block.conv_bias;
    c.out_scale = block.x_scale;
    c.out_zero_point = block.x_zero_point;
    c.batch = at.sequences;
    c.seqlen = at.steps;
    c.width = m_.width;
    c.x_stride_token = 2 * m_.dim;
    c.x_stride_batch = at.steps * c.x_stride_token;
    c.x = act_.xz;
    c.weight = block.conv_weight;
    c.initial_state = state;
    c.q = act_.x;
    // One token may write over the state that it reads; of several, other threads may still read it.
    c.final_state = at.steps == 1 ? state : act_.conv_state;
    note(causal_conv1d_quantize(c, threads_));
    if (at.steps > 1) {
      std::memcpy(state, act_.conv_state, static_cast<size_t>(at.sequences * state_bytes));
    }
  }

  void scan(const Place& at, const LanguageBlock& block) {
    float* const state =
        p_.ssm_state + (at.layer * p_.batch + at.first_sequence) * m_.dstate * m_.dim;
    SelectiveScanParams s;
    s.batch = at.sequences;
    s.seqlen = at.steps;
    s.dim = m_.dim;
    s.dstate = m_.dstate;
    s.chunk_size = at.steps;
    s.x = act_.x;
    s.x_stride_token = m_.dim;
    s.x_scale = block.x_scale;
    s.x_zero_point = block.x_zero_point;
    s.dt = act_.dt;
    s.dt_stride_token = m_.dim;
    s.dt_bias = block.dt_bias;
    s.A = block.A;
    s.B = act_.dtBC + m_.dt_rank;
    s.C = act_.dtBC + m_.dt_rank + m_.dstate;
    s.B_dtype = s.C_dtype = s.z_dtype = DType::kI8;
    s.B_stride_token = s.C_stride_token = m_.dt_rank + 2 * m_.dstate;
    s.B_scale = block.dtBC_scale + m_.dt_rank;
    s.C_scale = block.dtBC_scale + m_.dt_rank + m_.dstate;
    s.D = block.D;
    s.z = act_.xz + m_.dim;
    s.z_stride_token = 2 * m_.dim;
    s.z_scale = block.xz_scale + m_.dim;
    s.gate_scale = block.gate_scale;
    s.readout_scale = block.readout_scale;
    s.rotate_state = m_.rotate_state;
    s.initial_state = s.final_state = state;
    s.y = act_.dt;
    s.x_stride_batch = at.steps * s.x_stride_token;
    s.dt_stride_batch = at.steps * s.dt_stride_token;
    s.z_stride_batch = at.steps * s.z_stride_token;
    s.B_stride_batch = s.C_stride_batch = at.steps * s.B_stride_token;
    note(selective_scan(s, threads_));
  }

  // The scan's result to int8, in the place of x.
  void round_out(int64_t rows, const LanguageBlock& block) {
    if (m_.hadamard_base_order == 0) {
      QuantizeParams q;
      q.tokens = rows;
      q.dim = m_.dim;
      q.x_stride_token = m_.dim;
      q.x = act_.dt;
      q.scale = block.out_scale;
      q.q = act_.x;
      note(quantize(q, threads_));
      return;
    }
    HadamardParams h;
    h.tokens = rows;
    h.dim = m_.dim;
    h.x_stride_token = m_.dim;
    h.base_order = m_.hadamard_base_order;
    h.x = act_.dt;
    h.scale = block.out_scale;
    h.q = act_.x;
    note(hadamard_quantize(h, threads_));
  }

  // So many tokens of the stream of each sequence; strides in tokens, from sequence to sequence.
  void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                 int64_t steps) const {
    for (int64_t b = 0; b < p_.batch; ++b) {
      std::memcpy(to + b * to_stride * m_.hidden, from + b * from_stride * m_.hidden,
                  static_cast<size_t>(steps * m_.hidden) * sizeof(float));
    }
  }

  void run_head() {
    norm(p_.batch, act_.last, m_.head_norm_weight, m_.head_norm_eps, m_.head_scale);
    dequantize(p_.batch, act_.q, m_.hidden, m_.head, m_.head_scale, nullptr, p_.logits);
  }

  const LanguageModelParams& p_;
  const LanguageModel& m_;
  const Threads& threads_;
  const Cut cut_;
  Arena arena_;
  const Activations act_;
  Status status_ = Status::ok();
};

// What a kernel would refuse half-way, when states have changed already.
Status check_sizes(const LanguageModelParams& p) {
  const LanguageModel& m = *p.model;
  if (p.batch == 0 || p.seqlen == 0) {
    return Status::unsupported("expected at least one sequence of at least one token");
  }
  if (m.width < 2 || m.width > 4) return Status::unsupported("expected width 2, 3 or 4");
  if (m.dstate > kMaxDState) return Status::unsupported("expected dstate of at most 256");
  if (larger(larger(m.hidden, m.dim), m.dt_rank) > kMaxKWithOffset) {
    return Status::unsupported("expected hidden, dim and dt_rank of at most 65536");
  }
  return Status::ok();
}

}  // namespace

int64_t language_model_workspace_bytes(const LanguageModel& model, int64_t batch, int64_t seqlen,
                                       int64_t num_threads) {
  Arena arena(nullptr);
  const Activations activations(model, Cut(batch, seqlen), batch, num_threads, &arena);
  return arena.used();
}

Status language_model(const LanguageModelParams& p, const Threads& threads) {
  Status status = check_sizes(p);
  if (!status.is_ok()) return status;
  Team team(threads);
  team.run([&](const Threads& awake) { status = Runner(p, awake).run(); });
  return status;
}

}  // namespace mambaquant::cpu
