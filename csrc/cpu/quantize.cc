// quantize, dequantize. Bound: bytes. A float32 element is read once (4 bytes) and written as one byte;
// the arithmetic is four instructions a vector. Dynamic scales read x twice: rows (per token) come from
// L1 the second time, whole tensors and columns from memory, which is why static scales are the rule.
#include "mambaquant/quantize.h"

#include "cpu/kernels.h"
#include "cpu/simd/quant.h"

namespace mambaquant::cpu::MBQ_ISA {

namespace {

constexpr int64_t kElementsPerTask = 16384;

int64_t rows_per_task(int64_t dim) {
  return dim >= kElementsPerTask ? 1 : kElementsPerTask / (dim + 1) + 1;
}

template <typename T>
float row_amax(const T* x, int64_t dim) {
  F32 amax = set1(0.0f);
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) amax = max(abs(load(x + c)), amax);
  if (c < dim) amax = max(abs(load(x + c, dim - c)), amax);
  return reduce_max(amax);
}

// One scale for the row.
template <typename T>
void quantize_row(const T* x, float inv_scale, const int32_t* zero_point, int8_t* q, int64_t dim) {
  const F32 inv = set1(inv_scale);
  const F32 zero = set1(zero_point == nullptr ? 0.0f : static_cast<float>(*zero_point));
  const auto round = [&](F32 v) {
    return zero_point == nullptr ? quantize_symmetric(v, inv) : quantize_asymmetric(v, inv, zero);
  };
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store(q + c, round(load(x + c)));
  if (c < dim) store(q + c, round(load(x + c, dim - c)), dim - c);
}

// A scale for each column.
template <typename T>
void quantize_row_per_channel(const T* x, const float* scale, const int32_t* zero_point, int8_t* q,
                              int64_t dim) {
  const F32 one = set1(1.0f);
  for (int64_t c = 0; c < dim; c += kLanes) {
    const int64_t n = dim - c < kLanes ? dim - c : kLanes;
    // A tail's unused lanes divide by 0 and are not stored.
    const F32 inv = one / load(scale + c, n);
    const F32 v = load(x + c, n);
    const F32 rounded = zero_point == nullptr
                            ? quantize_symmetric(v, inv)
                            : quantize_asymmetric(v, inv, to_f32(load_i32(zero_point + c, n)));
    store(q + c, rounded, n);
  }
}

template <typename T>
void scales_per_channel(const QuantizeParams& p, const T* x, const Threads& threads) {
  threads.parallel_for(p.dim, 256, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t n = end - c < kLanes ? end - c : kLanes;
      F32 amax = set1(0.0f);
      for (int64_t t = 0; t < p.tokens; ++t) {
        amax = max(abs(load(x + t * p.x_stride_token + c, n)), amax);
      }
      float lanes[kLanes];
      store(lanes, amax);
      for (int64_t i = 0; i < n; ++i) p.scale_out[c + i] = scale_from_amax(lanes[i]);
    }
  });
}

template <typename T>
float tensor_scale(const QuantizeParams& p, const T* x) {
  float amax = 0.0f;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const float row = row_amax(x + t * p.x_stride_token, p.dim);
    amax = row > amax ? row : amax;
  }
  return scale_from_amax(amax);
}

template <typename T>
Status quantize_typed(const QuantizeParams& p, const Threads& threads) {
  const T* x = static_cast<const T*>(p.x);
  const bool is_dynamic = p.scale == nullptr;
  const float* scale = is_dynamic ? p.scale_out : p.scale;
  if (is_dynamic && p.granularity == Granularity::kPerTensor) p.scale_out[0] = tensor_scale(p, x);
  if (is_dynamic && p.granularity == Granularity::kPerChannel) scales_per_channel(p, x, threads);
  threads.parallel_for(p.tokens, rows_per_task(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = x + t * p.x_stride_token;
      int8_t* q = p.q + t * p.dim;
      if (p.granularity == Granularity::kPerChannel) {
        quantize_row_per_channel(row, scale, p.zero_point, q, p.dim);
        continue;
      }
      const int64_t i = p.granularity == Granularity::kPerToken ? t : 0;
      if (is_dynamic && p.granularity == Granularity::kPerToken) {
        p.scale_out[t] = scale_from_amax(row_amax(row, p.dim));
      }
      quantize_row(row, 1.0f / scale[i], p.zero_point == nullptr ? nullptr : p.zero_point + i, q,
                   p.dim);
    }
  });
  return Status::ok();
}

template <typename T>
Status dequantize_typed(const DequantizeParams& p, const Threads& threads) {
  T* x = static_cast<T*>(p.x);
  const bool per_channel = p.granularity == Granularity::kPerChannel;
  threads.parallel_for(p.tokens, rows_per_task(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = p.granularity == Granularity::kPerToken ? t : 0;
      const F32 row_scale = set1(per_channel ? 0.0f : p.scale[i]);
      const F32 row_zero =
          set1(per_channel || p.zero_point == nullptr ? 0.0f : static_cast<float>(p.zero_point[i]));
      for (int64_t c = 0; c < p.dim; c += kLanes) {
        const int64_t n = p.dim - c < kLanes ? p.dim - c : kLanes;
        const F32 scale = per_channel ? load(p.scale + c, n) : row_scale;
        const F32 zero = per_channel && p.zero_point != nullptr
                             ? to_f32(load_i32(p.zero_point + c, n))
                             : row_zero;
        store(x + t * p.dim + c, (load(p.q + t * p.q_stride_token + c, n) - zero) * scale, n);
      }
    }
  });
  return Status::ok();
}

}  // namespace

Status quantize(const QuantizeParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    return quantize_typed<typename decltype(tag)::type>(p, threads);
  });
}

Status dequantize(const DequantizeParams& p, const Threads& threads) {
  return MBQ_DISPATCH_FLOAT(p.x_dtype, [&](auto tag) {
    return dequantize_typed<typename decltype(tag)::type>(p, threads);
  });
}

}  // namespace mambaquant::cpu::MBQ_ISA
