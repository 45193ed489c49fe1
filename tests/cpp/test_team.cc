// Team: every element of every parallel_for is met once, whatever the pool gives, and what one parallel_for
// wrote the next one reads.
#include "cpu/team.h"

#include <atomic>
#include <vector>

#include "check.h"

namespace {

using namespace mambaquant;
using namespace mambaquant::test;
using cpu::Team;

// A pool that says it has more threads than it gives: the whole range on one thread.
Threads stingy(int64_t num_threads) {
  Threads threads;
  threads.num_threads = num_threads;
  threads.run = [](void*, int64_t count, int64_t, Threads::Body body, const void* data) {
    body(data, 0, count);
  };
  return threads;
}

// The parts one after another, the last of them first: followers come when the leader has yet to
// begin, or has gone.
Threads one_by_one(int64_t num_threads, bool leader_first) {
  Threads threads;
  threads.num_threads = num_threads;
  threads.pool = reinterpret_cast<void*>(static_cast<intptr_t>(leader_first));
  threads.run = [](void* first, int64_t count, int64_t, Threads::Body body, const void* data) {
    std::thread leader;
    if (first == nullptr) leader = std::thread(body, data, 0, 1);
    if (first != nullptr) body(data, 0, 1);
    for (int64_t i = 1; i < count; ++i) body(data, i, i + 1);
    if (leader.joinable()) leader.join();
  };
  return threads;
}

// Each step adds 1 to every element of a row of its own and reads the row before.
void check_steps(const Threads& pool, int64_t count, int64_t grain, int64_t steps) {
  std::vector<std::vector<int32_t>> rows(static_cast<size_t>(steps + 1),
                                         std::vector<int32_t>(static_cast<size_t>(count), 0));
  Team team(pool);
  team.run([&](const Threads& threads) {
    for (int64_t step = 0; step < steps; ++step) {
      const std::vector<int32_t>& before = rows[static_cast<size_t>(step)];
      std::vector<int32_t>& after = rows[static_cast<size_t>(step + 1)];
      threads.parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        // Mirrored, so that most elements come from another thread's part.
        for (int64_t i = begin; i < end; ++i) {
          after[static_cast<size_t>(i)] += before[static_cast<size_t>(count - 1 - i)] + 1;
        }
      });
    }
  });
  for (int64_t step = 0; step <= steps; ++step) {
    for (const int32_t value : rows[static_cast<size_t>(step)]) CHECK(value == step);
  }
}

void test_every_element_once() {
  for (const int64_t count : {1, 2, 3, 7, 100}) {
    for (const int64_t grain : {1, 40, 1000}) {
      check_steps(serial(), count, grain, 20);
      for (const int64_t size : {2, 3, 8}) {
        check_steps(threaded(size), count, grain, 20);
        check_steps(stingy(size), count, grain, 20);
        check_steps(one_by_one(size, true), count, grain, 20);
      }
      check_steps(one_by_one(2, false), count, grain, 20);
    }
  }
}

void test_many_steps() { check_steps(threaded(4), 64, 1, 20000); }

// A team of more than a team can have.
void test_large_pool() { check_steps(stingy(100000), 1000, 1, 3); }

void test_grains_shrink() {
  Team team(threaded(2));
  std::atomic<int64_t> parts{0};
  team.run([&](const Threads& threads) {
    CHECK(threads.num_threads == 2);
    const int64_t count = 2 * 1000 / Team::kGrainDivisor;
    threads.parallel_for(count, 1000, [&](int64_t, int64_t) { ++parts; });
  });
  CHECK(parts == 2);
}

}  // namespace

int main() {
  test_every_element_once();
  test_many_steps();
  test_large_pool();
  test_grains_shrink();
  return result();
}
