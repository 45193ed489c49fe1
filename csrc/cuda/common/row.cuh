// Rows that a group of threads reads once and passes over several times: a reduction, then rounding.
//
// A block is blockDim.y groups of blockDim.x threads, whole warps, a row for each group. Vector v of
// thread i is number v * blockDim.x + i of the row, so that a warp touches neighbouring vectors. Rows of
// up to kVectors vectors a thread stay in registers (RegisterRow); longer ones are read again, from L2,
// in each pass (MemoryRow).
//
// A source says what an element of the row is. fetch<kVec>(column) begins a load, take() makes floats
// of it (and may store them elsewhere), stored() is what to read in later passes.
#pragma once

#include "cuda/common/float_vec.cuh"
#include "cuda/common/quant.cuh"
#include "cuda/common/reduce.cuh"

namespace mambaquant::cuda {

// Of the hardware's 16 barriers a block, one is __syncthreads's.
inline constexpr int32_t kMaxGroupsWithBarrier = 15;

// The threads of one row. Each group has a barrier of its own, so that groups do not wait for each
// other's rows.
class RowGroup {
 public:
  // Floats of shared memory that the groups of a block need together.
  static constexpr int32_t kPartials = 2 * kMaxGroupsWithBarrier * kWarpSize;

  __device__ explicit RowGroup(float* partials)
      : partials_(partials + static_cast<int32_t>(threadIdx.y) * 2 * kWarpSize) {}

  // Every thread gets the result. Two slots take turns: who writes a slot again has passed the barrier
  // of the reduction between, and so have those who read it.
  template <typename Op>
  __device__ float reduce(float x) {
    x = warp_reduce<Op>(x);
    const int32_t threads = static_cast<int32_t>(blockDim.x);
    if (threads == kWarpSize) return x;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    float* slot = partials_ + turn_ * kWarpSize;
    turn_ ^= 1;
    if (lane == 0) slot[threadIdx.x / kWarpSize] = x;
    named_barrier(1 + static_cast<int32_t>(threadIdx.y), threads);
    return warp_reduce<Op>(lane < threads / kWarpSize ? slot[lane] : Op::identity());
  }

 private:
  float* partials_;
  int32_t turn_ = 0;
};

// A row as it lies in memory.
struct PlainSource {
  const void* row;
  DType dtype;

  template <int32_t kVec>
  using Fetched = RawVec<kVec>;

  template <int32_t kVec>
  __device__ RawVec<kVec> fetch(int64_t column) const {
    return load_raw<kVec>(row, column, dtype);
  }
  template <int32_t kVec>
  __device__ void take(const RawVec<kVec>& fetched, int64_t, float (&values)[kVec]) const {
    to_floats(fetched, dtype, values);
  }
  __device__ PlainSource stored() const { return *this; }
};

template <int32_t kVecWidth_, int32_t kVectors>
class RegisterRow {
 public:
  static constexpr int32_t kVec = kVecWidth_;
  static constexpr int32_t kValuesPerThread = kVec * kVectors;

  template <typename Source>
  __device__ RegisterRow(const Source& source, int64_t dim) : dim_(static_cast<int32_t>(dim)) {
    typename Source::template Fetched<kVec> fetched[kVectors];
#pragma unroll
    for (int32_t v = 0; v < kVectors; ++v) {
      if (column(v) < dim_) fetched[v] = source.template fetch<kVec>(column(v));
    }
#pragma unroll
    for (int32_t v = 0; v < kVectors; ++v) {
      if (column(v) < dim_) source.take(fetched[v], column(v), values_[v]);
    }
  }

  // f(values, column) for each vector of the thread. The first pass must be for_each_first.
  template <typename F>
  __device__ void for_each_first(const F& f) {
    for_each(f);
  }
  template <typename F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int32_t v = 0; v < kVectors; ++v) {
      if (column(v) < dim_) f(values_[v], column(v));
    }
  }

 private:
  __device__ int32_t column(int32_t v) const {
    return static_cast<int32_t>(v * blockDim.x + threadIdx.x) * kVec;
  }

  int32_t dim_;
  float values_[kVectors][kVec];
};

template <int32_t kVecWidth_, typename Source>
class MemoryRow {
 public:
  static constexpr int32_t kVec = kVecWidth_;

  __device__ MemoryRow(const Source& source, int64_t dim) : source_(source), dim_(dim) {}

  template <typename F>
  __device__ void for_each_first(const F& f) {
    pass(source_, f);
  }
  template <typename F>
  __device__ void for_each(const F& f) const {
    pass(source_.stored(), f);
  }

 private:
  template <typename AnySource, typename F>
  __device__ void pass(const AnySource& source, const F& f) const {
    const int64_t step = static_cast<int64_t>(blockDim.x) * kVec;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * kVec; column < dim_; column += step) {
      float values[kVec];
      source.take(source.template fetch<kVec>(column), column, values);
      f(values, column);
    }
  }

  Source source_;
  int64_t dim_;
};

template <int32_t kVec>
__device__ inline float amax_of(const float (&x)[kVec]) {
  float amax = 0.0f;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) amax = fmaxf(amax, fabsf(x[i]));
  return amax;
}

template <int32_t kVec>
__device__ inline void store_symmetric(int8_t* q, const float (&x)[kVec], float inv_scale) {
  Vec<int8_t, kVec> out;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) out[i] = quantize_symmetric(x[i], inv_scale);
  store_vec(q, out);
}

}  // namespace mambaquant::cuda
