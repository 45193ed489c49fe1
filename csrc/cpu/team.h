// A team of threads that stay awake from one kernel to the next. Waking a sleeping thread takes some
// microseconds, longer than most kernels of one token; a team that spins between kernels starts the
// next one in a fraction of a microsecond.
//
// The team borrows its threads from the caller's pool for the length of run(): the leader runs the
// given function, the others wait for its parallel_fors. A part that no thread has taken when the
// leader has finished its own is run by the leader, so that a pool that gives fewer threads, or gives
// them late, costs time and never an answer. Which part a number stands for does not depend on who
// runs it.
#pragma once

#include <atomic>
#include <cstdint>

#include "mambaquant/types.h"

namespace mambaquant::cpu {

class Team {
 public:
  static constexpr int64_t kMaxThreads = 255;
  // A wake-up costs about a thirtieth of a torch pool's.
  static constexpr int64_t kGrainDivisor = 32;

  explicit Team(const Threads& pool);

  // Calls lead(threads), where threads.parallel_for runs on this team; returns when it has returned.
  template <typename F>
  void run(const F& lead) {
    run_erased(
        [](const void* data, const Threads& threads) { (*static_cast<const F*>(data))(threads); },
        &lead);
  }

 private:
  static constexpr uint64_t kPartsRange = 256;  // more than a job has parts

  using Lead = void (*)(const void* data, const Threads& threads);

  // Jobs are numbered from 1. A part of job j is taken by whoever raises `taken` to j, and is done
  // when `done` is j.
  struct alignas(64) Part {
    std::atomic<uint64_t> taken{0};
    std::atomic<uint64_t> done{0};
  };
  // One parallel_for; read by those alone who have taken a part of it.
  struct Job {
    Threads::Body body = nullptr;
    const void* data = nullptr;
    int64_t count = 0, parts = 0;
  };

  void run_erased(Lead lead, const void* data);
  void share(int64_t count, int64_t grain, Threads::Body body, const void* data);
  bool take(int64_t part, uint64_t job);
  void run_part(int64_t part, uint64_t job);
  void follow(int64_t part);

  const Threads pool_;
  int64_t size_;
  Job job_;
  // The number of the newest job times kPartsRange, plus its parts: both in one word, since a thread
  // that looks late must not read the parts of the next job with the number of this one.
  alignas(64) std::atomic<uint64_t> posted_{0};
  alignas(64) std::atomic<bool> is_over_{false};
  Part parts_[kMaxThreads];
};

}  // namespace mambaquant::cpu
