// Types shared by every kernel API: element types, result status, and the thread pool handle.
// Nothing here needs torch or the CUDA toolkit.
#pragma once

#include <cstdint>

namespace mambaquant {

enum class DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kI8 = 3 };

// int8 weights and symmetric activations use [-127, 127]; asymmetric activations [-128, 127].
inline constexpr int32_t kQMax = 127;
inline constexpr int32_t kQMinSymmetric = -127;
inline constexpr int32_t kQMinAsymmetric = -128;

// Longest int8 dot product whose sum is certain to fit int32: 128 * 127 * kMaxK < 2^31.
inline constexpr int64_t kMaxK = 131072;

// Smallest max|x| that a dynamic scale is made from: a row of zeros gets a finite scale and q = 0.
inline constexpr float kTinyAmax = 1e-12f;

// What a launcher returns. Launchers never throw, print, abort or allocate.
struct Status {
  enum class Code : int32_t { kOk = 0, kUnsupported = 1, kFailed = 2 };
  Code code = Code::kOk;
  const char* message = "";  // static storage; names what was expected

  bool is_ok() const { return code == Code::kOk; }
  static Status ok() { return {}; }
  static Status unsupported(const char* message) { return {Code::kUnsupported, message}; }
  static Status failed(const char* message) { return {Code::kFailed, message}; }
};

// A CUDA stream, as the runtime's cudaStream_t; null: the default stream. Launchers enqueue on it and
// return; they neither synchronise nor allocate, so that a CUDA graph can capture them.
struct Stream {
  void* handle = nullptr;
};

// A parallel-for that the caller supplies: torch's pool in the extension, a team whose threads stay
// awake within a language model, a serial loop in the C++ tests. `body(data, begin, end)` is called on
// disjoint ranges that cover [0, count).
struct Threads {
  using Body = void (*)(const void* data, int64_t begin, int64_t end);
  void (*run)(void* pool, int64_t count, int64_t grain, Body body, const void* data) = nullptr;
  void* pool = nullptr;
  int64_t num_threads = 1;
  // Grains are made for threads that must be woken, some microseconds; a thread that is awake is
  // worth a part as small as a grain over this.
  int64_t grain_divisor = 1;

  // `grain` is the smallest range worth a thread of its own.
  template <typename F>
  void parallel_for(int64_t count, int64_t grain, const F& f) const {
    if (count <= 0) return;
    grain = grain > grain_divisor ? grain / grain_divisor : 1;
    const Body body = [](const void* data, int64_t begin, int64_t end) {
      (*static_cast<const F*>(data))(begin, end);
    };
    if (run == nullptr || num_threads == 1 || count <= grain) {
      body(&f, 0, count);
    } else {
      run(pool, count, grain, body, &f);
    }
  }
};

}  // namespace mambaquant
