// causal_conv1d_quantize against its formula in double, on exact-size buffers: within one step of int8. The
// state that it hands on is exact, and a sequence in single steps gives equal bits.
#include "mambaquant/conv1d.h"

#include <cmath>
#include <numeric>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

struct Case {
  int64_t batch, seqlen, dim, width, padding;
};

constexpr Case kCases[] = {
    {1, 1, 1, 4, 0},   {2, 5, 7, 4, 3},     {1, 3, 16, 2, 0}, {3, 2, 17, 3, 1}, {2, 9, 33, 4, 5},
    {1, 70, 97, 4, 0}, {2, 1, 384, 4, 384}, {0, 4, 8, 4, 0},  {2, 0, 8, 4, 0},  {1, 4, 0, 4, 0}};

struct Walk {
  bool reverse = false, ordered = false;
};

struct Problem {
  Problem(const Case& shape, bool has_options)
      : c(shape),
        full(has_options),
        stride(c.dim + c.padding),
        x(c.batch * c.seqlen * c.dim == 0 ? 0 : (c.batch * c.seqlen - 1) * stride + c.dim),
        weight(c.width * c.dim),
        initial(c.batch * (c.width - 1) * c.dim),
        x_scale(c.dim),
        weight_scale(c.dim),
        bias(c.dim),
        out_scale(c.dim),
        zero_point(c.dim),
        order(c.seqlen) {
    Random random(static_cast<uint64_t>(c.dim * 8 + c.width));
    fill_int8(x, random);
    fill_int8(weight, random);
    fill_int8(initial, random);
    fill_uniform(x_scale, random, 0.01f, 0.03f);
    fill_uniform(weight_scale, random, 0.002f, 0.01f);
    fill_uniform(bias, random, -1.0f, 1.0f);
    fill_uniform(out_scale, random, 0.01f, 0.05f);
    for (int64_t i = 0; i < c.dim; ++i) zero_point[i] = random.integer(-110, -60);
    std::iota(order.data(), order.data() + c.seqlen, 0);
    for (int32_t i = 0; i < c.seqlen; ++i) std::swap(order[i], order[random.integer(0, i)]);
  }

  CausalConv1dQuantizeParams params() {
    CausalConv1dQuantizeParams p;
    p.batch = c.batch;
    p.seqlen = c.seqlen;
    p.dim = c.dim;
    p.width = c.width;
    p.x_stride_token = stride;
    p.x_stride_batch = c.seqlen * stride;
    p.x = x.data();
    p.x_scale = x_scale.data();
    p.weight = weight.data();
    p.weight_scale = weight_scale.data();
    p.bias = full ? bias.data() : nullptr;
    p.out_scale = out_scale.data();
    p.out_zero_point = full ? zero_point.data() : nullptr;
    p.initial_state = full ? initial.data() : nullptr;
    return p;
  }

  // The token of step t.
  int64_t token(int64_t t, Walk walk) const {
    const int64_t step = walk.reverse ? c.seqlen - 1 - t : t;
    return walk.ordered ? order[step] : step;
  }

  // The input of a step, which may lie before the first.
  int32_t input(int64_t b, int64_t t, int64_t e, Walk walk) const {
    if (t >= 0) return x[(b * c.seqlen + token(t, walk)) * stride + e];
    return full ? initial[(b * (c.width - 1) + c.width - 1 + t) * c.dim + e] : 0;
  }

  double expected(int64_t b, int64_t t, int64_t e, Walk walk) const {
    int32_t acc = 0;
    for (int64_t j = 0; j < c.width; ++j) {
      acc += weight[j * c.dim + e] * input(b, t - c.width + 1 + j, e, walk);
    }
    const double v = acc * static_cast<double>(x_scale[e] * weight_scale[e]) +
                     (full ? static_cast<double>(bias[e]) : 0.0);
    return v / (1.0 + std::exp(-v)) / static_cast<double>(out_scale[e]) +
           (full ? zero_point[e] : 0);
  }

  Case c;
  bool full;
  int64_t stride;
  Buffer<int8_t> x, weight, initial;
  Buffer<float> x_scale, weight_scale, bias, out_scale;
  Buffer<int32_t> zero_point, order;
};

void test_sequence(const Case& c, bool full, Walk walk, const Threads& threads) {
  Problem problem(c, full);
  Buffer<int8_t> q(c.batch * c.seqlen * c.dim), state(c.batch * (c.width - 1) * c.dim);
  CausalConv1dQuantizeParams p = problem.params();
  p.q = q.data();
  p.final_state = state.data();
  p.reverse = walk.reverse;
  p.order = walk.ordered ? problem.order.data() : nullptr;
  CHECK(cpu::causal_conv1d_quantize(p, threads).is_ok());
  const int32_t low = full ? kQMinAsymmetric : kQMinSymmetric;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t e = 0; e < c.dim; ++e) {
      for (int64_t t = 0; t < c.seqlen; ++t) {
        const int64_t at = (b * c.seqlen + problem.token(t, walk)) * c.dim + e;
        if (!CHECK(is_within_one_step(q[at], problem.expected(b, t, e, walk), low))) return;
      }
      for (int64_t j = 0; j < c.width - 1; ++j) {
        const int32_t last = problem.input(b, c.seqlen - c.width + 1 + j, e, walk);
        if (!CHECK(state[(b * (c.width - 1) + j) * c.dim + e] == last)) return;
      }
    }
  }
}

// The update reads and writes one state.
void test_steps(const Case& c, const Threads& threads) {
  Problem problem(c, true);
  const int64_t state_count = c.batch * (c.width - 1) * c.dim;
  Buffer<int8_t> q(c.batch * c.seqlen * c.dim), state(state_count), steps_state(state_count);
  CausalConv1dQuantizeParams whole = problem.params();
  whole.q = q.data();
  whole.final_state = state.data();
  CHECK(cpu::causal_conv1d_quantize(whole, threads).is_ok());

  std::copy(problem.initial.data(), problem.initial.data() + state_count, steps_state.data());
  Buffer<int8_t> step_q(c.batch * c.dim);
  for (int64_t t = 0; t < c.seqlen; ++t) {
    CausalConv1dQuantizeParams p = problem.params();
    p.seqlen = 1;
    p.x += t * problem.stride;
    p.x_stride_token = 0;
    p.initial_state = p.final_state = steps_state.data();
    p.q = step_q.data();
    CHECK(cpu::causal_conv1d_quantize(p, threads).is_ok());
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t e = 0; e < c.dim; ++e) {
        if (!CHECK(step_q[b * c.dim + e] == q[(b * c.seqlen + t) * c.dim + e])) return;
      }
    }
  }
  CHECK(same_bytes(state, steps_state));
}

void test_conv1d() {
  for (const Case& c : kCases) {
    for (const Threads& threads : {serial(), threaded(3)}) {
      for (const bool full : {false, true}) {
        for (const Walk walk : {Walk{}, Walk{true}, Walk{false, true}, Walk{true, true}}) {
          test_sequence(c, full, walk, threads);
        }
      }
      test_steps(c, threads);
    }
  }
}

}  // namespace

int main() {
  for_each_isa(test_conv1d);
  return result();
}
