#include "cpu/team.h"

#include <thread>

namespace mambaquant::cpu {

namespace {

constexpr int32_t kSpinsBeforeYield = 4096;

// Waits a moment, the longer the more often it was called: a thread that spins for long may keep
// from its core the one that it waits for.
class Patience {
 public:
  void wait() {
    if (++spins_ > kSpinsBeforeYield) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
  }

 private:
  int32_t spins_ = 0;
};

}  // namespace

Team::Team(const Threads& pool)
    : pool_(pool), size_(pool.num_threads < kMaxThreads ? pool.num_threads : kMaxThreads) {}

void Team::run_erased(Lead lead, const void* data) {
  if (pool_.run == nullptr || size_ <= 1) {
    lead(data, Threads{});
    return;
  }
  Threads threads;
  threads.num_threads = size_;
  threads.grain_divisor = kGrainDivisor;
  threads.pool = this;
  threads.run = [](void* team, int64_t count, int64_t grain, Threads::Body body, const void* job) {
    static_cast<Team*>(team)->share(count, grain, body, job);
  };
  pool_.parallel_for(size_, 1, [&](int64_t begin, int64_t) {
    if (begin > 0) {
      follow(begin);
      return;
    }
    lead(data, threads);
    is_over_.store(true, std::memory_order_release);
  });
}

void Team::share(int64_t count, int64_t grain, Threads::Body body, const void* data) {
  const int64_t worth = (count + grain - 1) / grain;
  job_ = {body, data, count, worth < size_ ? worth : size_};
  const uint64_t job = posted_.load(std::memory_order_relaxed) / kPartsRange + 1;
  posted_.store(job * kPartsRange + static_cast<uint64_t>(job_.parts), std::memory_order_release);
  run_part(0, job);
  for (int64_t part = 1; part < job_.parts; ++part) {
    if (take(part, job)) run_part(part, job);
  }
  for (int64_t part = 1; part < job_.parts; ++part) {
    Patience patience;
    while (parts_[part].done.load(std::memory_order_acquire) != job) patience.wait();
  }
}

bool Team::take(int64_t part, uint64_t job) {
  uint64_t taken = parts_[part].taken.load(std::memory_order_relaxed);
  return taken < job &&
         parts_[part].taken.compare_exchange_strong(taken, job, std::memory_order_acq_rel);
}

void Team::run_part(int64_t part, uint64_t job) {
  const int64_t begin = part * job_.count / job_.parts, end = (part + 1) * job_.count / job_.parts;
  job_.body(job_.data, begin, end);
  parts_[part].done.store(job, std::memory_order_release);
}

void Team::follow(int64_t part) {
  uint64_t seen = 0;
  Patience patience;
  while (!is_over_.load(std::memory_order_acquire)) {
    const uint64_t posted = posted_.load(std::memory_order_acquire);
    if (posted == seen) {
      patience.wait();
      continue;
    }
    seen = posted;
    patience = {};
    const bool has_part = part < static_cast<int64_t>(posted % kPartsRange);
    if (has_part && take(part, posted / kPartsRange)) run_part(part, posted / kPartsRange);
  }
}

}  // namespace mambaquant::cpu
