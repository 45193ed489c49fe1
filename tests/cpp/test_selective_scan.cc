// selective_scan on exact-size buffers: against its formula in double without the int8 read-out, in one chunk
// and in several, along an order and with an addend, and in single steps, which must give equal bits to the whole.
#include "mambaquant/selective_scan.h"

#include <cmath>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

struct Case {
  int64_t batch, seqlen, dim, dstate, padding;
};

constexpr Case kCases[] = {{1, 1, 1, 1, 0},    {2, 5, 7, 16, 3},   {1, 9, 16, 4, 0},
                           {1, 70, 33, 16, 1}, {2, 3, 96, 16, 96}, {1, 130, 17, 8, 0},
                           {1, 4, 5, 12, 0},   {1, 3, 8, 256, 0},  {0, 4, 8, 16, 0},
                           {2, 0, 8, 16, 0},   {1, 4, 0, 16, 0}};

// Rows of `columns` elements, `padding` apart, and no element behind the last.
int64_t span(const Case& c, int64_t columns) {
  const int64_t rows = c.batch * c.seqlen;
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * (columns + c.padding) + columns;
}

struct Problem {
  // with_int8: B, C and z are int8 and the read-out is quantized; otherwise they are floats.
  Problem(const Case& shape, bool with_int8)
      : c(shape),
        is_int8(with_int8),
        x(span(c, c.dim)),
        B8(span(c, c.dstate)),
        C8(span(c, c.dstate)),
        z8(span(c, c.dim)),
        dt(span(c, c.dim)),
        B(span(c, c.dstate)),
        C(span(c, c.dstate)),
        z(span(c, c.dim)),
        addend(span(c, c.dim)),
        x_scale(c.dim),
        dt_bias(c.dim),
        A(c.dstate * c.dim),
        B_scale(c.dstate),
        C_scale(1),
        D(c.dim),
        z_scale(c.dim),
        gate_scale(c.dim),
        readout_scale(c.dim),
        initial(c.batch * c.dstate * c.dim),
        x_zero_point(c.dim),
        order(c.seqlen) {
    Random random(static_cast<uint64_t>(c.dim * 300 + c.dstate));
    for (Buffer<int8_t>* buffer : {&x, &B8, &C8, &z8}) fill_int8(*buffer, random);
    for (Buffer<float>* buffer : {&dt, &B, &C, &z, &addend, &dt_bias, &D, &initial}) {
      fill_uniform(*buffer, random, -1.0f, 1.0f);
    }
    fill_uniform(A, random, -8.0f, -0.5f);
    for (Buffer<float>* buffer : {&x_scale, &B_scale, &C_scale, &z_scale, &readout_scale}) {
      fill_uniform(*buffer, random, 0.01f, 0.02f);
    }
    fill_uniform(gate_scale, random, 0.5f, 2.0f);
    for (int64_t e = 0; e < c.dim; ++e) x_zero_point[e] = random.integer(-90, -60);
    for (int64_t t = 0; t < c.seqlen; ++t) {
      order[t] = static_cast<int32_t>(t);
      std::swap(order[t], order[random.integer(0, static_cast<int32_t>(t))]);
    }
  }

  SelectiveScanParams params() {
    SelectiveScanParams p;
    p.batch = c.batch;
    p.seqlen = c.seqlen;
    p.dim = c.dim;
    p.dstate = c.dstate;
    p.x_stride_token = p.dt_stride_token = p.z_stride_token = p.addend_stride_token =
        c.dim + c.padding;
    p.B_stride_token = p.C_stride_token = c.dstate + c.padding;
    p.x_stride_batch = p.dt_stride_batch = p.z_stride_batch = p.addend_stride_batch =
        c.seqlen * p.x_stride_token;
    p.B_stride_batch = p.C_stride_batch = c.seqlen * p.B_stride_token;
    p.x = x.data();
    p.x_scale = x_scale.data();
    p.x_zero_point = x_zero_point.data();
    p.dt = dt.data();
    p.dt_bias = dt_bias.data();
    p.A = A.data();
    p.D = D.data();
    p.gate_scale = gate_scale.data();
    p.initial_state = initial.data();
    p.chunk_size = c.seqlen > 0 ? c.seqlen : 1;
    p.B = is_int8 ? static_cast<const void*>(B8.data()) : B.data();
    p.C = is_int8 ? static_cast<const void*>(C8.data()) : C.data();
    p.z = is_int8 ? static_cast<const void*>(z8.data()) : z.data();
    if (!is_int8) return p;
    p.B_dtype = p.C_dtype = p.z_dtype = DType::kI8;
    p.B_scale = B_scale.data();
    p.C_scale = C_scale.data();
    p.z_scale = z_scale.data();
    p.readout_scale = readout_scale.data();
    p.rotate_state = (c.dstate & (c.dstate - 1)) == 0;
    return p;
  }

  Case c;
  bool is_int8;
  Buffer<int8_t> x, B8, C8, z8;
  Buffer<float> dt, B, C, z, addend, x_scale, dt_bias, A, B_scale, C_scale, D, z_scale, gate_scale;
  Buffer<float> readout_scale, initial;
  Buffer<int32_t> x_zero_point, order;
};

// routed: along `order`, with `addend`.
struct Walk {
  bool reverse, routed;
  int64_t chunk_size;  // 0: the whole sequence
};

// What the float path gives for one channel of one sequence, in double.
void expect_channel(const Problem& problem, int64_t b, int64_t e, const Walk& walk,
                    const Buffer<float>& y) {
  const Case& c = problem.c;
  std::vector<double> h;
  for (int64_t n = 0; n < c.dstate; ++n) {
    h.push_back(problem.initial[(b * c.dstate + n) * c.dim + e]);
  }
  for (int64_t step = 0; step < c.seqlen; ++step) {
    const int64_t t = walk.reverse ? c.seqlen - 1 - step : step;
    const int64_t row = b * c.seqlen + (walk.routed ? problem.order[t] : t);
    const int64_t at = row * (c.dim + c.padding) + e;
    const double x =
        (problem.x[at] - problem.x_zero_point[e]) * static_cast<double>(problem.x_scale[e]);
    const double dt =
        std::log1p(std::exp(static_cast<double>(problem.dt[at] + problem.dt_bias[e])));
    double sum = 0.0;
    for (int64_t n = 0; n < c.dstate; ++n) {
      const int64_t at_state = row * (c.dstate + c.padding) + n;
      double& state = h[static_cast<size_t>(n)];
      state = std::exp(dt * static_cast<double>(problem.A[n * c.dim + e])) * state +
              dt * x * static_cast<double>(problem.B[at_state]);
      sum += state * static_cast<double>(problem.C[at_state]);
    }
    const double z = problem.z[at];
    const double gate = z / (1.0 + std::exp(-static_cast<double>(problem.gate_scale[e]) * z));
    const double addend = walk.routed ? problem.addend[at] : 0.0f;
    const double expected = (sum + static_cast<double>(problem.D[e]) * x + addend) * gate;
    const double error = std::fabs(static_cast<double>(y[row * c.dim + e]) - expected);
    if (!CHECK(error < 1e-3)) return;
  }
}

void test_formula(const Case& c, const Walk& walk, const Threads& threads) {
  Problem problem(c, false);
  Buffer<float> y(c.batch * c.seqlen * c.dim), state(c.batch * c.dstate * c.dim);
  SelectiveScanParams p = problem.params();
  p.y = y.data();
  p.final_state = state.data();
  p.reverse = walk.reverse;
  p.order = walk.routed ? problem.order.data() : nullptr;
  p.addend = walk.routed ? problem.addend.data() : nullptr;
  if (walk.chunk_size > 0) p.chunk_size = walk.chunk_size;
  Buffer<float> workspace(cpu::selective_scan_workspace_bytes(p) / 4);
  p.workspace = workspace.data();
  CHECK(cpu::selective_scan(p, threads).is_ok());
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t e = 0; e < c.dim; ++e) expect_channel(problem, b, e, walk, y);
  }
}

void test_steps(const Case& c, bool is_int8, const Threads& threads) {
  Problem problem(c, is_int8);
  const int64_t state_count = c.batch * c.dstate * c.dim;
  Buffer<float> y(c.batch * c.seqlen * c.dim), state(state_count), steps_state(state_count);
  SelectiveScanParams whole = problem.params();
  whole.y = y.data();
  whole.final_state = state.data();
  CHECK(cpu::selective_scan(whole, threads).is_ok());

  std::copy(problem.initial.data(), problem.initial.data() + state_count, steps_state.data());
  const int64_t B_size = is_int8 ? 1 : 4;
  Buffer<float> step_y(c.batch * c.dim);
  for (int64_t t = 0; t < c.seqlen; ++t) {
    SelectiveScanParams p = problem.params();
    p.seqlen = p.chunk_size = 1;
    p.x += t * p.x_stride_token;
    p.dt = static_cast<const char*>(p.dt) + t * p.dt_stride_token * 4;
    p.B = static_cast<const char*>(p.B) + t * p.B_stride_token * B_size;
    p.C = static_cast<const char*>(p.C) + t * p.C_stride_token * B_size;
    p.z = static_cast<const char*>(p.z) + t * p.z_stride_token * B_size;
    p.initial_state = p.final_state = steps_state.data();
    p.y = step_y.data();
    CHECK(cpu::selective_scan(p, threads).is_ok());
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t e = 0; e < c.dim; ++e) {
        if (!CHECK(step_y[b * c.dim + e] == y[(b * c.seqlen + t) * c.dim + e])) return;
      }
    }
  }
  if (c.seqlen > 0) CHECK(same_bytes(state, steps_state));
}

void test_selective_scan() {
  for (const Case& c : kCases) {
    for (const Threads& threads : {serial(), threaded(3)}) {
      for (const bool routed : {false, true}) {
        test_formula(c, {false, routed, 0}, threads);
        test_formula(c, {true, routed, 0}, threads);
        test_formula(c, {false, routed, 3}, threads);
        test_formula(c, {true, routed, 64}, threads);
      }
      test_steps(c, false, threads);
      test_steps(c, true, threads);
    }
  }
}

}  // namespace

int main() {
  for_each_isa(test_selective_scan);
  return result();
}
