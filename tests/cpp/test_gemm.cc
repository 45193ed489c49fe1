// gemm, gemm_dequantize, gemm_requantize against the triple loop, on exact-size buffers: the int8 products are
// exact, and the epilogues are float32 in the order that the header states, so every result is equal in bits.
#include "mambaquant/gemm.h"

#include <cmath>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

struct Case {
  int64_t m, n, k;
  int64_t padding;  // elements between the rows of a, weight and residual
};

constexpr Case kCases[] = {{1, 1, 1, 0},     {1, 33, 7, 0},   {2, 31, 64, 1},  {3, 32, 65, 0},
                           {5, 64, 24, 3},   {7, 56, 768, 0}, {17, 80, 33, 5}, {64, 96, 48, 0},
                           {0, 8, 8, 0},     {3, 0, 8, 0},    {2, 5, 0, 0},    {130, 40, 129, 0},
                           {1, 40, 9000, 0}, {13, 16, 12, 0}, {25, 112, 20, 2}};

int64_t span(int64_t rows, int64_t columns, int64_t padding) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * (columns + padding) + columns;
}

// Inputs of one case, packed for the instruction set in use.
struct Problem {
  Problem(const Case& shape, const Threads& threads)
      : c(shape),
        a(span(c.m, c.k, c.padding)),
        weight(span(c.n, c.k, c.padding)),
        packed(packed_gemm_weight_bytes(c.n, c.k)),
        workspace(gemm_workspace_bytes(c.m, c.k, threads.num_threads)),
        expected(c.m * c.n) {
    Random random(static_cast<uint64_t>(c.k));
    fill_int8(a, random, kQMinAsymmetric);
    fill_int8(weight, random);
    PackGemmWeightParams p;
    p.n = c.n;
    p.k = c.k;
    p.weight_stride_row = c.k + c.padding;
    p.weight = weight.data();
    p.packed = packed.data();
    CHECK(cpu::pack_gemm_weight(p, threads).is_ok());
    // Every byte is written, the padding too.
    Buffer<int8_t> again(packed.size());
    for (int64_t i = 0; i < again.size(); ++i) again[i] = static_cast<int8_t>(packed[i] + 1);
    p.packed = again.data();
    CHECK(cpu::pack_gemm_weight(p, threads).is_ok());
    CHECK(same_bytes(again, packed));
    for (int64_t m = 0; m < c.m; ++m) {
      for (int64_t n = 0; n < c.n; ++n) {
        int32_t sum = 0;
        for (int64_t k = 0; k < c.k; ++k) {
          sum += a[m * (c.k + c.padding) + k] * weight[n * (c.k + c.padding) + k];
        }
        expected[m * c.n + n] = sum;
      }
    }
  }

  GemmOperands operands() {
    GemmOperands o;
    o.m = c.m;
    o.n = c.n;
    o.k = c.k;
    o.a_stride_row = c.k + c.padding;
    o.a = a.data();
    o.packed = packed.data();
    o.workspace = workspace.size() == 0 ? nullptr : workspace.data();
    return o;
  }

  Case c;
  Buffer<int8_t> a, weight, packed, workspace;
  Buffer<int32_t> expected;
};

// Which optional parameters there are. The kernels take ways of their own for the first two.
enum class Extras { kNone, kStatic, kAll };  // kStatic: one scale of all rows, and no zero points

struct Scales {
  Scales(const Case& c, Extras extras)
      : per_token(extras == Extras::kAll),
        has_columns(extras != Extras::kNone),
        a_scale(per_token ? c.m : 1),
        b_scale(c.n),
        bias(c.n),
        offset(c.n) {
    Random random(7);
    fill_uniform(a_scale, random, 0.01f, 0.02f);
    fill_uniform(b_scale, random, 0.001f, 0.01f);
    fill_uniform(bias, random, -1.0f, 1.0f);
    for (int64_t n = 0; n < c.n; ++n) offset[n] = random.integer(-5000, 5000);
  }

  GemmScales params() {
    GemmScales s;
    s.a_scale_is_per_token = per_token;
    s.a_scale = a_scale.data();
    s.b_scale = b_scale.data();
    s.acc_offset = has_columns ? offset.data() : nullptr;
    s.bias = has_columns ? bias.data() : nullptr;
    return s;
  }

  float value(int32_t acc, int64_t m, int64_t n) const {
    const float centred = static_cast<float>(acc - (has_columns ? offset[n] : 0));
    const float scaled = centred * (a_scale[per_token ? m : 0] * b_scale[n]);
    return has_columns ? scaled + bias[n] : scaled;
  }

  bool per_token, has_columns;
  Buffer<float> a_scale, b_scale, bias;
  Buffer<int32_t> offset;
};

void test_sums(Problem& problem, const Threads& threads) {
  Buffer<int32_t> acc(problem.c.m * problem.c.n);
  GemmParams p;
  p.operands = problem.operands();
  p.acc = acc.data();
  CHECK(cpu::gemm(p, threads).is_ok());
  CHECK(same_bytes(acc, problem.expected));
}

void test_dequantize(Problem& problem, Extras extras, const Threads& threads) {
  const bool adds = extras != Extras::kNone;
  const Case& c = problem.c;
  Random random(3);
  Scales scales(c, extras);
  Buffer<float> residual(span(c.m, c.n, c.padding)), out(c.m * c.n);
  fill_uniform(residual, random, -2.0f, 2.0f);
  GemmDequantizeParams p;
  p.operands = problem.operands();
  p.scales = scales.params();
  p.residual_stride_row = c.n + c.padding;
  p.residual = adds ? residual.data() : nullptr;
  p.out = out.data();
  CHECK(cpu::gemm_dequantize(p, threads).is_ok());
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      float value = scales.value(problem.expected[m * c.n + n], m, n);
      if (adds) value += residual[m * p.residual_stride_row + n];
      if (!CHECK(out[m * c.n + n] == value)) return;
    }
  }
}

void test_requantize(Problem& problem, Extras extras, const Threads& threads) {
  const bool is_asymmetric = extras == Extras::kAll;
  const Case& c = problem.c;
  Random random(4);
  Scales scales(c, extras);
  Buffer<float> out_scale(c.n);
  Buffer<int32_t> zero_point(c.n);
  Buffer<int8_t> q(c.m * c.n);
  fill_uniform(out_scale, random, 0.01f, 0.1f);
  for (int64_t n = 0; n < c.n; ++n) zero_point[n] = random.integer(-100, 100);
  GemmRequantizeParams p;
  p.operands = problem.operands();
  p.scales = scales.params();
  p.out_scale = out_scale.data();
  p.out_zero_point = is_asymmetric ? zero_point.data() : nullptr;
  p.q = q.data();
  CHECK(cpu::gemm_requantize(p, threads).is_ok());
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      const float value = scales.value(problem.expected[m * c.n + n], m, n);
      if (!CHECK(q[m * c.n + n] ==
                 round_to_int8(value, out_scale[n], is_asymmetric ? &zero_point[n] : nullptr))) {
        return;
      }
    }
  }
}

void test_gemm() {
  for (const Case& c : kCases) {
    for (const Threads& threads : {serial(), threaded(3)}) {
      Problem problem(c, threads);
      test_sums(problem, threads);
      for (const Extras extras : {Extras::kNone, Extras::kStatic, Extras::kAll}) {
        test_dequantize(problem, extras, threads);
        test_requantize(problem, extras, threads);
      }
    }
  }
}

}  // namespace

int main() {
  for_each_isa(test_gemm);
  return result();
}
