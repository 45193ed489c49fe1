// depthwise_conv2d_quantize against its formula in double, on exact-size buffers: within one step of int8. Images are
// a crop of a larger one, whose columns and rows lie apart.
#include "mambaquant/conv2d.h"

#include <cmath>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

struct Case {
  int64_t batch, height, width, dim, kernel_height, kernel_width, stride, padding;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 3, 3, 1, 0},   {2, 5, 7, 7, 3, 3, 1, 3},   {1, 3, 8, 16, 3, 3, 2, 0},
    {2, 4, 15, 33, 7, 7, 1, 5}, {1, 9, 16, 17, 7, 7, 2, 1}, {1, 6, 13, 64, 5, 5, 1, 0},
    {2, 7, 14, 70, 5, 5, 2, 2}, {1, 14, 9, 97, 3, 7, 1, 0}, {1, 8, 22, 31, 7, 3, 2, 4},
    {1, 2, 3, 5, 1, 1, 1, 0},   {1, 70, 3, 8, 1, 5, 1, 1},  {0, 4, 4, 8, 3, 3, 1, 0},
    {1, 0, 4, 8, 3, 3, 2, 0},   {1, 4, 0, 8, 7, 7, 1, 0},   {1, 4, 4, 0, 3, 3, 1, 0},
};

struct Problem {
  Problem(const Case& shape, bool has_options)
      : c(shape),
        full(has_options),
        column(c.dim + c.padding),
        row(c.width * column + c.padding),
        image(c.height * row + c.padding),
        x(c.batch * c.height * c.width * c.dim == 0
              ? 0
              : (c.batch - 1) * image + (c.height - 1) * row + (c.width - 1) * column + c.dim),
        weight(c.kernel_height * c.kernel_width * c.dim),
        x_scale(c.dim),
        weight_scale(c.dim),
        bias(c.dim),
        out_scale(c.dim),
        zero_point(c.dim) {
    Random random(static_cast<uint64_t>(c.dim * 8 + c.kernel_width));
    fill_int8(x, random, -128);
    fill_int8(weight, random);
    fill_uniform(x_scale, random, 0.01f, 0.03f);
    fill_uniform(weight_scale, random, 0.001f, 0.005f);
    fill_uniform(bias, random, -1.0f, 1.0f);
    fill_uniform(out_scale, random, 0.01f, 0.05f);
    for (int64_t i = 0; i < c.dim; ++i) zero_point[i] = random.integer(-110, -60);
  }

  DepthwiseConv2dQuantizeParams params() {
    DepthwiseConv2dQuantizeParams p;
    p.batch = c.batch;
    p.height = c.height;
    p.width = c.width;
    p.dim = c.dim;
    p.kernel_height = c.kernel_height;
    p.kernel_width = c.kernel_width;
    p.stride = c.stride;
    p.x_stride_batch = image;
    p.x_stride_row = row;
    p.x_stride_column = column;
    p.x = x.data();
    p.x_scale = x_scale.data();
    p.weight = weight.data();
    p.weight_scale = weight_scale.data();
    p.bias = full ? bias.data() : nullptr;
    p.out_scale = out_scale.data();
    p.out_zero_point = full ? zero_point.data() : nullptr;
    return p;
  }

  int32_t input(int64_t b, int64_t i, int64_t j, int64_t e) const {
    if (i < 0 || i >= c.height || j < 0 || j >= c.width) return 0;
    return x[b * image + i * row + j * column + e];
  }

  double expected(int64_t b, int64_t i, int64_t j, int64_t e) const {
    int32_t acc = 0;
    for (int64_t m = 0; m < c.kernel_height; ++m) {
      for (int64_t n = 0; n < c.kernel_width; ++n) {
        acc += weight[(m * c.kernel_width + n) * c.dim + e] *
               input(b, i * c.stride + m - c.kernel_height / 2,
                     j * c.stride + n - c.kernel_width / 2, e);
      }
    }
    const double v = acc * static_cast<double>(x_scale[e] * weight_scale[e]) +
                     (full ? static_cast<double>(bias[e]) : 0.0);
    return v / (1.0 + std::exp(-v)) / static_cast<double>(out_scale[e]) +
           (full ? zero_point[e] : 0);
  }

  Case c;
  bool full;
  int64_t column, row, image;
  Buffer<int8_t> x, weight;
  Buffer<float> x_scale, weight_scale, bias, out_scale;
  Buffer<int32_t> zero_point;
};

void test_image(const Case& c, bool full, const Threads& threads) {
  Problem problem(c, full);
  DepthwiseConv2dQuantizeParams p = problem.params();
  Buffer<int8_t> q(c.batch * p.out_height() * p.out_width() * c.dim);
  p.q = q.data();
  CHECK(cpu::depthwise_conv2d_quantize(p, threads).is_ok());
  const int32_t low = full ? kQMinAsymmetric : kQMinSymmetric;
  int64_t at = 0;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < p.out_height(); ++i) {
      for (int64_t j = 0; j < p.out_width(); ++j) {
        for (int64_t e = 0; e < c.dim; ++e, ++at) {
          if (!CHECK(is_within_one_step(q[at], problem.expected(b, i, j, e), low))) return;
        }
      }
    }
  }
  CHECK(at == q.size());
}

void test_refusals() {
  for (const int64_t size : {0, 2, 9}) {
    DepthwiseConv2dQuantizeParams p;
    p.kernel_height = 3;
    p.kernel_width = size;
    CHECK(cpu::depthwise_conv2d_quantize(p, serial()).code == Status::Code::kUnsupported);
  }
  DepthwiseConv2dQuantizeParams p;
  p.kernel_height = p.kernel_width = 3;
  p.stride = 3;
  CHECK(cpu::depthwise_conv2d_quantize(p, serial()).code == Status::Code::kUnsupported);
}

void test_conv2d() {
  for (const Case& c : kCases) {
    for (const Threads& threads : {serial(), threaded(3)}) {
      for (const bool full : {false, true}) test_image(c, full, threads);
    }
  }
  test_refusals();
}

}  // namespace

int main() {
  for_each_isa(test_conv2d);
  return result();
}
