// hadamard_transform and hadamard_quantize on exact-size buffers: forth and back is the identity, lengths are
// kept, and the quantized rows are those of the transform.
#include "mambaquant/hadamard.h"

#include <cmath>

#include "check.h"
#include "mambaquant/hadamard_tables.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

HadamardParams params_of(const Buffer<float>& x, int64_t tokens, int64_t dim, int64_t stride,
                         int64_t order) {
  HadamardParams p;
  p.tokens = tokens;
  p.dim = dim;
  p.x_stride_token = stride;
  p.base_order = order;
  p.x = x.data();
  return p;
}

void test_size(int64_t order, int64_t block, int64_t tokens, const Threads& threads) {
  const int64_t dim = order * block, stride = dim + 3;
  Random random(static_cast<uint64_t>(dim));
  Buffer<float> x(tokens == 0 ? 0 : (tokens - 1) * stride + dim), y(tokens * dim),
      back(tokens * dim);
  fill_uniform(x, random, -2.0f, 2.0f);

  HadamardParams forth = params_of(x, tokens, dim, stride, order);
  forth.y = y.data();
  CHECK(cpu::hadamard_transform(forth, threads).is_ok());
  HadamardParams inverse = params_of(y, tokens, dim, dim, order);
  inverse.inverse = true;
  inverse.y = back.data();
  CHECK(cpu::hadamard_transform(inverse, threads).is_ok());

  Buffer<int8_t> q(tokens * dim);
  Buffer<float> scale_out(tokens);
  HadamardParams quantize = forth;
  quantize.y = nullptr;
  quantize.q = q.data();
  quantize.scale_out = scale_out.data();
  CHECK(cpu::hadamard_quantize(quantize, threads).is_ok());

  for (int64_t t = 0; t < tokens; ++t) {
    double length_x = 0.0, length_y = 0.0, amax = 0.0;
    for (int64_t i = 0; i < dim; ++i) {
      const double from = x[t * stride + i], to = y[t * dim + i];
      length_x += from * from;
      length_y += to * to;
      amax = std::fmax(amax, std::fabs(to));
      if (!CHECK(std::fabs(back[t * dim + i] - x[t * stride + i]) < 1e-4f)) return;
    }
    CHECK(is_close(static_cast<float>(length_y), length_x, 1e-4));
    CHECK(is_close(scale_out[t], amax / kQMax, 1e-5));
    for (int64_t i = 0; i < dim; ++i) {
      const double expected =
          static_cast<double>(y[t * dim + i]) / static_cast<double>(scale_out[t]);
      if (!CHECK(is_within_one_step(q[t * dim + i], expected, kQMinSymmetric))) return;
    }
  }
}

void test_hadamard() {
  for (const Threads& threads : {serial(), threaded(3)}) {
    for (int64_t dim = 1; dim <= 4096; dim *= 2) test_size(1, dim, 3, threads);
    test_size(1, kMaxHadamardDim, 1, threads);
    test_size(1, 16, 0, threads);
    test_size(1, 64, 100, threads);
    for (const HadamardBaseRows& table : kHadamardBaseRows) {
      for (const int64_t block : {1, 2, 8, 16, 64}) test_size(table.order, block, 3, threads);
    }
  }
}

}  // namespace

int main() {
  for_each_isa(test_hadamard);
  return result();
}
