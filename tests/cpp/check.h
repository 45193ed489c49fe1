// What the C++ tests share: checks that count failures, buffers of the exact size (a kernel that
// reads or writes one element too far is stopped there), thread pools, and the loop over
// instruction sets.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "mambaquant/types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(0))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(0))
#endif

namespace mambaquant::test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool check(bool condition, const char* what, const char* file, int line) {
  if (!condition) {
    ++failures();
    std::fprintf(stderr, "%s:%d: %s: CHECK(%s) failed\n", file, line,
                 cpu::isa_name(cpu::current_isa()), what);
  }
  return condition;
}

// Counts a failure and goes on; true where the condition holds.
#define CHECK(condition) \
  ::mambaquant::test::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)

// `count` elements and not one more: the last one ends at a page that may not be touched, so that
// even an access that AddressSanitizer does not instrument (a masked vector load) faults; what lies
// before the first element in its page is poisoned. Elements are aligned for T and no further, as
// in a view.
template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Buffer(int64_t count) : count_(count) {
    const auto bytes = static_cast<size_t>(count) * sizeof(T);
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes + page - 1) / page * page;
    mapped_ = usable + page;
    void* memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    if (mprotect(base_ + usable, page, PROT_NONE) != 0) throw std::bad_alloc();
    std::memset(base_, 0x5a, usable);  // never zero by chance
    ASAN_POISON_MEMORY_REGION(base_, usable - bytes);
    data_ = reinterpret_cast<T*>(base_ + (usable - bytes));
  }
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(base_, mapped_);
    munmap(base_, mapped_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  void fill(T value) { std::fill(data_, data_ + count_, value); }

 private:
  char* base_ = nullptr;
  T* data_ = nullptr;
  size_t mapped_ = 0;
  int64_t count_;
};

template <typename T>
bool same_bytes(const Buffer<T>& a, const Buffer<T>& b) {
  const auto bytes = static_cast<size_t>(a.size()) * sizeof(T);
  return a.size() == b.size() && (bytes == 0 || std::memcmp(a.data(), b.data(), bytes) == 0);
}

// A small generator of its own: the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  // In [low, high).
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(bits() >> 8) * 0x1p-24f;
  }
  // In [low, high].
  int32_t integer(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(bits() % static_cast<uint32_t>(high - low + 1));
  }

 private:
  uint64_t state_;
};

inline void fill_uniform(Buffer<float>& buffer, Random& random, float low, float high) {
  for (int64_t i = 0; i < buffer.size(); ++i) buffer[i] = random.uniform(low, high);
}
inline void fill_int8(Buffer<int8_t>& buffer, Random& random, int32_t low = kQMinSymmetric) {
  for (int64_t i = 0; i < buffer.size(); ++i) {
    buffer[i] = static_cast<int8_t>(random.integer(low, kQMax));
  }
}

// q = clamp(rne(x / scale) + zero_point), the rounding that is exact by definition.
inline int8_t round_to_int8(float x, float scale, const int32_t* zero_point) {
  const float inv_scale = 1.0f / scale;
  const float low = static_cast<float>(zero_point == nullptr ? kQMinSymmetric : kQMinAsymmetric);
  const float q = std::nearbyint(x * inv_scale) +
                  (zero_point == nullptr ? 0.0f : static_cast<float>(*zero_point));
  return static_cast<int8_t>(std::fmin(std::fmax(q, low), static_cast<float>(kQMax)));
}

// Whether q is what `expected` rounds to, or a neighbour: another order of float additions may move a value
// over a rounding boundary.
inline bool is_within_one_step(int8_t q, double expected, int32_t low) {
  const double clamped = std::fmin(std::fmax(std::nearbyint(expected), low), kQMax);
  return std::fabs(q - clamped) <= 1.0;
}

inline bool is_close(float actual, double expected, double relative) {
  return std::fabs(static_cast<double>(actual) - expected) <= relative * std::fabs(expected);
}

inline Threads serial() { return {}; }

// Ranges of at least `grain` on threads of their own, as torch's pool hands them out.
inline Threads threaded(int64_t num_threads) {
  Threads threads;
  threads.num_threads = num_threads;
  // The count travels in the pointer: there is no pool object to point to.
  threads.pool = reinterpret_cast<void*>(static_cast<intptr_t>(num_threads));
  threads.run = [](void* pool, int64_t count, int64_t grain, Threads::Body body, const void* data) {
    const int64_t most = reinterpret_cast<intptr_t>(pool);
    const int64_t parts = std::clamp<int64_t>((count + grain - 1) / grain, 1, most);
    const int64_t step = (count + parts - 1) / parts;
    std::vector<std::thread> workers;
    for (int64_t begin = 0; begin < count; begin += step) {
      workers.emplace_back(body, data, begin, std::min(begin + step, count));
    }
    for (std::thread& worker : workers) worker.join();
  };
  return threads;
}

// Calls test() once for every instruction set that this processor can run, and names the others.
template <typename F>
void for_each_isa(const F& test) {
  const cpu::Isa before = cpu::current_isa();
  for (int32_t i = 0; i < cpu::kNumIsas; ++i) {
    const cpu::Isa isa = static_cast<cpu::Isa>(i);
    if (!cpu::isa_is_supported(isa)) {
      std::printf("skipped: this processor or build lacks %s\n", cpu::isa_name(isa));
      continue;
    }
    if (!CHECK(cpu::force_isa(isa).is_ok()) || !CHECK(cpu::current_isa() == isa)) continue;
    test();
  }
  CHECK(cpu::force_isa(before).is_ok());
}

// For main to return.
inline int result() {
  if (failures() != 0) std::fprintf(stderr, "%d checks failed\n", failures());
  return failures() == 0 ? 0 : 1;
}

}  // namespace mambaquant::test
