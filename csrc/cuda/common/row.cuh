// Rows that a group of threads reads once and passes over several times: a reduction, then rounding.
//
// A block is blockDim.y groups of blockDim.x threads, whole warps, a row for each group. Vector v of
// thread i is number v * blockDim.x + i of the row, so that a warp touches neighbouring vectors. Rows of
// up to kVectors vectors a thread stay in registers (RegisterRow); longer ones are read again, from L2,
// in each pass (MemoryRow).
//
// A source says what an element of the row is, from the thread's first vector on: fetch<kVec>(offset)
// begins the load of the vector `offset` elements further, take() makes floats of it (and may store them
// elsewhere), stored() is what to read in later passes. Offsets are the same for all threads, which
// leaves one address a thread and tensor.
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

// Where the thread's first vector begins.
template <int32_t kVec>
__device__ inline int32_t first_column() {
  return static_cast<int32_t>(threadIdx.x) * kVec;
}

// A row as it lies in memory.
struct PlainSource {
  const void* first;
  DType dtype;
  bool is_aligned = true;  // or vectors are loaded element by element

  template <int32_t kVec>
  using Fetched = RawVec<kVec>;

  template <int32_t kVec>
  __device__ RawVec<kVec> fetch(int64_t offset) const {
    return load_raw<kVec>(first, offset, dtype, is_aligned);
  }
  template <int32_t kVec>
  __device__ void take(const RawVec<kVec>& fetched, int64_t, float (&values)[kVec]) const {
    to_floats(fetched, dtype, values);
  }
  __device__ PlainSource stored() const { return *this; }
};

// for_each(f) calls f(values, offset) for each vector of the thread. What f writes to the values stays in
// a RegisterRow and is lost in a MemoryRow. The first pass over a row must be for_each_first, which is
// where a MemoryRow uses the source itself.
//
// kIsFullRow: the row is exactly blockDim.x * kValues long, so that nothing needs a comparison. Without it a
// vector costs two or three instructions more in each pass.
template <int32_t kVecWidth, int32_t kVectors, bool kIsFullRow>
class RegisterRow {
 public:
  static constexpr int32_t kVec = kVecWidth;
  static constexpr bool kInRegisters = true, kIsFull = kIsFullRow;
  static constexpr int32_t kValues = kVec * kVectors;  // that a thread holds

  template <typename Source>
  __device__ RegisterRow(const Source& source, int64_t dim)
      : left_(static_cast<int32_t>(dim) - first_column<kVec>()),
        step_(static_cast<int32_t>(blockDim.x) * kVec) {
    typename Source::template Fetched<kVec> fetched[kVectors];
#pragma unroll
    for (int32_t v = 0; v < kVectors; ++v) {
      if (holds(v)) fetched[v] = source.template fetch<kVec>(v * step_);
    }
#pragma unroll
    for (int32_t v = 0; v < kVectors; ++v) {
      if (holds(v)) source.take(fetched[v], v * step_, values_[v]);
    }
  }

  template <typename F>
  __device__ void for_each_first(const F& f) {
    for_each(f);
  }
  template <typename F>
  __device__ void for_each(const F& f) {
#pragma unroll
    for (int32_t v = 0; v < kVectors; ++v) {
      if (holds(v)) f(values_[v], v * step_);
    }
  }

 private:
  __device__ bool holds(int32_t v) const { return kIsFull || v * step_ < left_; }

  int32_t left_;  // elements from the thread's first one to the row's end
  int32_t step_;
  float values_[kVectors][kVec];
};

template <int32_t kVecWidth, typename Source>
class MemoryRow {
 public:
  static constexpr int32_t kVec = kVecWidth;
  static constexpr bool kInRegisters = false, kIsFull = false;
  static constexpr int32_t kValues = kVec;

  __device__ MemoryRow(const Source& source, int64_t dim)
      : source_(source), left_(dim - first_column<kVec>()) {}

  template <typename F>
  __device__ void for_each_first(const F& f) const {
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
    for (int64_t offset = 0; offset < left_; offset += step) {
      float values[kVec];
      source.take(source.template fetch<kVec>(offset), offset, values);
      f(values, offset);
    }
  }

  Source source_;
  int64_t left_;
};

template <int32_t kVec>
__device__ inline float amax_of(const float (&x)[kVec]) {
  float amax = 0.0f;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) amax = fmaxf(amax, fabsf(x[i]));
  return amax;
}

template <int32_t kVec>
__device__ inline void store_symmetric(int8_t* q, const float (&x)[kVec], float inv_scale,
                                       bool is_aligned = true) {
  Vec<int8_t, kVec> out;
#pragma unroll
  for (int32_t i = 0; i < kVec; ++i) out[i] = quantize_symmetric(x[i], inv_scale);
  store_vec(q, out, is_aligned);
}

}  // namespace mambaquant::cuda
