// norm_quantize against its formula in double, on exact-size buffers: within one step of int8, and equal bits
// of the residual.
#include "mambaquant/norm.h"

#include <cmath>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

struct Case {
  int64_t tokens, dim, padding;
};

constexpr Case kCases[] = {{1, 1, 0},  {3, 7, 2},   {2, 8, 0},    {5, 15, 1}, {4, 16, 0},
                           {3, 17, 3}, {70, 97, 0}, {2, 1536, 1}, {0, 16, 0}, {3, 0, 0}};

// Which of the optional parameters are there.
struct Variant {
  bool layer_norm, has_residual, has_weight, is_static;
};

constexpr Variant kVariants[] = {{false, false, true, false},
                                 {false, true, false, true},
                                 {true, true, true, false},
                                 {true, false, false, true}};

void test_case(const Case& c, const Variant& v, const Threads& threads) {
  Random random(static_cast<uint64_t>(c.dim + 1));
  const int64_t stride = c.dim + c.padding;
  const int64_t span = c.tokens == 0 || c.dim == 0 ? 0 : (c.tokens - 1) * stride + c.dim;
  const int64_t count = c.tokens * c.dim;
  Buffer<float> x(span), residual(span), weight(c.dim), bias(c.dim), scale(1);
  Buffer<float> scale_out(v.is_static ? 0 : c.tokens), residual_out(v.has_residual ? count : 0);
  Buffer<int8_t> q(count);
  fill_uniform(x, random, -3.0f, 3.0f);
  fill_uniform(residual, random, -3.0f, 3.0f);
  fill_uniform(weight, random, 0.5f, 2.0f);
  fill_uniform(bias, random, -1.0f, 1.0f);
  scale[0] = 0.03f;

  NormQuantizeParams p;
  p.tokens = c.tokens;
  p.dim = c.dim;
  p.x_stride_token = p.residual_stride_token = stride;
  p.subtract_mean = v.layer_norm;
  p.x = x.data();
  p.residual = v.has_residual ? residual.data() : nullptr;
  p.weight = v.has_weight ? weight.data() : nullptr;
  p.bias = v.has_weight && v.layer_norm ? bias.data() : nullptr;
  p.scale = v.is_static ? scale.data() : nullptr;
  p.q = q.data();
  p.scale_out = v.is_static ? nullptr : scale_out.data();
  p.residual_out = v.has_residual ? residual_out.data() : nullptr;
  CHECK(cpu::norm_quantize(p, threads).is_ok());

  std::vector<double> y(static_cast<size_t>(c.dim));
  for (int64_t t = 0; t < c.tokens; ++t) {
    double mean = 0.0, square = 0.0, amax = 0.0;
    for (int64_t i = 0; i < c.dim; ++i) {
      const float sum =
          v.has_residual ? x[t * stride + i] + residual[t * stride + i] : x[t * stride + i];
      if (v.has_residual && !CHECK(residual_out[t * c.dim + i] == sum)) return;
      y[static_cast<size_t>(i)] = sum;
      mean += sum / static_cast<double>(c.dim);
    }
    if (!v.layer_norm) mean = 0.0;
    for (const double value : y)
      square += (value - mean) * (value - mean) / static_cast<double>(c.dim);
    for (int64_t i = 0; i < c.dim; ++i) {
      double& value = y[static_cast<size_t>(i)];
      value = (value - mean) / std::sqrt(square + static_cast<double>(p.eps));
      if (p.weight != nullptr) value *= static_cast<double>(weight[i]);
      if (p.bias != nullptr) value += static_cast<double>(bias[i]);
      amax = std::fmax(amax, std::fabs(value));
    }
    const double step =
        v.is_static ? static_cast<double>(scale[0]) : std::fmax(amax, 1e-12) / kQMax;
    if (!v.is_static && c.dim > 0) CHECK(is_close(scale_out[t], step, 1e-5));
    for (int64_t i = 0; i < c.dim; ++i) {
      const double expected = y[static_cast<size_t>(i)] / step;
      if (!CHECK(is_within_one_step(q[t * c.dim + i], expected, kQMinSymmetric))) return;
    }
  }
}

void test_norm() {
  for (const Case& c : kCases) {
    for (const Variant& v : kVariants) {
      for (const Threads& threads : {serial(), threaded(3)}) test_case(c, v, threads);
    }
  }
}

}  // namespace

int main() {
  for_each_isa(test_norm);
  return result();
}
