// quantize and dequantize against a direct transcription of their formula, on exact-size buffers.
#include "mambaquant/quantize.h"

#include <cmath>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;

struct Case {
  int64_t tokens, dim;
  int64_t padding;  // elements between rows
};

constexpr Case kCases[] = {{1, 1, 0},  {3, 7, 0},  {2, 8, 1},    {5, 15, 3},
                           {4, 16, 0}, {3, 17, 5}, {2, 33, 0},   {7, 97, 2},
                           {0, 16, 0}, {3, 0, 0},  {300, 65, 0}, {2, 20000, 0}};
constexpr Granularity kGranularities[] = {Granularity::kPerTensor, Granularity::kPerToken,
                                          Granularity::kPerChannel};

// Elements that a strided matrix spans: the last row has no padding behind it.
int64_t span(const Case& c) {
  return c.tokens == 0 || c.dim == 0 ? 0 : (c.tokens - 1) * (c.dim + c.padding) + c.dim;
}

int64_t scale_count(const Case& c, Granularity granularity) {
  if (granularity == Granularity::kPerTensor) return 1;
  return granularity == Granularity::kPerToken ? c.tokens : c.dim;
}

int64_t scale_index(Granularity granularity, int64_t t, int64_t channel) {
  if (granularity == Granularity::kPerTensor) return 0;
  return granularity == Granularity::kPerToken ? t : channel;
}

void test_static(const Case& c, Granularity granularity, bool asymmetric, const Threads& threads) {
  Random random(static_cast<uint64_t>(c.dim));
  const int64_t scales = scale_count(c, granularity);
  Buffer<float> x(span(c)), scale(scales);
  Buffer<int32_t> zero_point(scales);
  Buffer<int8_t> q(c.tokens * c.dim);
  fill_uniform(x, random, -20.0f, 20.0f);
  fill_uniform(scale, random, 0.05f, 0.3f);
  for (int64_t i = 0; i < scales; ++i) zero_point[i] = random.integer(-100, 100);

  QuantizeParams p;
  p.tokens = c.tokens;
  p.dim = c.dim;
  p.x_stride_token = c.dim + c.padding;
  p.granularity = granularity;
  p.x = x.data();
  p.scale = scale.data();
  p.zero_point = asymmetric ? zero_point.data() : nullptr;
  p.q = q.data();
  CHECK(cpu::quantize(p, threads).is_ok());

  Buffer<float> back(c.tokens * c.dim);
  DequantizeParams d;
  d.tokens = c.tokens;
  d.dim = c.dim;
  d.q_stride_token = c.dim;
  d.granularity = granularity;
  d.q = q.data();
  d.scale = scale.data();
  d.zero_point = p.zero_point;
  d.x = back.data();
  CHECK(cpu::dequantize(d, threads).is_ok());

  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t channel = 0; channel < c.dim; ++channel) {
      const int64_t i = scale_index(granularity, t, channel);
      const int64_t at = t * c.dim + channel;
      const int32_t* zero = asymmetric ? &zero_point[i] : nullptr;
      if (!CHECK(q[at] == round_to_int8(x[t * p.x_stride_token + channel], scale[i], zero))) return;
      const auto centred = static_cast<float>(q[at] - (zero == nullptr ? 0 : *zero));
      if (!CHECK(back[at] == centred * scale[i])) return;
    }
  }
}

void test_dynamic(const Case& c, Granularity granularity, const Threads& threads) {
  Random random(static_cast<uint64_t>(c.tokens));
  const int64_t scales = scale_count(c, granularity);
  Buffer<float> x(span(c)), scale(scales), amax(scales);
  Buffer<int8_t> q(c.tokens * c.dim);
  fill_uniform(x, random, -3.0f, 3.0f);
  amax.fill(kTinyAmax);

  QuantizeParams p;
  p.tokens = c.tokens;
  p.dim = c.dim;
  p.x_stride_token = c.dim + c.padding;
  p.granularity = granularity;
  p.x = x.data();
  p.scale_out = scale.data();
  p.q = q.data();
  CHECK(cpu::quantize(p, threads).is_ok());

  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t channel = 0; channel < c.dim; ++channel) {
      float& most = amax[scale_index(granularity, t, channel)];
      most = std::fmax(most, std::fabs(x[t * p.x_stride_token + channel]));
    }
  }
  for (int64_t i = 0; i < scales; ++i) CHECK(scale[i] == amax[i] / static_cast<float>(kQMax));
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t channel = 0; channel < c.dim; ++channel) {
      const float step = scale[scale_index(granularity, t, channel)];
      const float value = x[t * p.x_stride_token + channel];
      if (!CHECK(q[t * c.dim + channel] == round_to_int8(value, step, nullptr))) return;
    }
  }
}

// Every half-precision pattern is read through an exact-size buffer and gives a value of the grid.
void test_half(DType dtype) {
  constexpr int64_t kCount = 65536;
  Buffer<uint16_t> x(kCount);
  Buffer<float> scale(1);
  Buffer<int8_t> q(kCount);
  for (int64_t i = 0; i < kCount; ++i) x[i] = static_cast<uint16_t>(i);
  scale[0] = 0.01f;
  QuantizeParams p;
  p.tokens = 1;
  p.dim = kCount;
  p.x_stride_token = kCount;
  p.x_dtype = dtype;
  p.x = x.data();
  p.scale = scale.data();
  p.q = q.data();
  CHECK(cpu::quantize(p, serial()).is_ok());
  const bool in_range =
      std::all_of(q.data(), q.data() + kCount, [](int8_t v) { return v >= -127; });
  CHECK(in_range);
}

void test_quantize() {
  for (const Case& c : kCases) {
    for (const Granularity granularity : kGranularities) {
      for (const Threads& threads : {serial(), threaded(3)}) {
        test_static(c, granularity, false, threads);
        test_static(c, granularity, true, threads);
        test_dynamic(c, granularity, threads);
      }
    }
  }
  test_half(DType::kF16);
  test_half(DType::kBF16);

  QuantizeParams wrong;
  wrong.x_dtype = DType::kI8;
  CHECK(cpu::quantize(wrong, serial()).code == Status::Code::kUnsupported);
}

}  // namespace

int main() {
  for_each_isa(test_quantize);
  return result();
}
