// ThreadPool: every task once, results visible to the caller, thousands of short loops. Meant for TSan too.
#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

namespace cachalot {
namespace {

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (int num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<int> runs(n, 0);
      std::atomic<int> bad_worker{0};
      pool.Run(n, [&](int64_t task, int worker) {
        ++runs[task];
        if (worker < 0 || worker >= num_threads) ++bad_worker;
      });
      EXPECT_EQ(runs, std::vector<int>(n, 1));
      EXPECT_EQ(bad_worker, 0);
    }
  }
}

TEST(ThreadPool, ManyShortLoops) {
  ThreadPool pool(4);
  std::vector<int64_t> slots(16);
  int64_t want = 0;
  for (int loop = 0; loop < 5000; ++loop) {
    const int64_t n = 1 + loop % 16;
    pool.Run(n, [&](int64_t task, int) { slots[task] += loop; });
    want += n * loop;
  }
  EXPECT_EQ(std::accumulate(slots.begin(), slots.end(), int64_t{0}), want);
}

TEST(ThreadPool, WakesSleepers) {
  ThreadPool pool(3);
  for (int loop = 0; loop < 5; ++loop) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long past the spinning
    // Every thread must take a task: each waits for the others.
    std::atomic<int> arrived{0};
    pool.Run(3, [&](int64_t, int) {
      ++arrived;
      while (arrived < 3) std::this_thread::yield();
    });
    EXPECT_EQ(arrived, 3);
  }
}

TEST(ThreadPool, WorkersHaveTheirOwnNumber) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<int> clashes{0};
  pool.Run(400, [&](int64_t, int worker) {
    if (busy[worker].fetch_add(1) != 0) ++clashes;
    std::this_thread::yield();
    --busy[worker];
  });
  EXPECT_EQ(clashes, 0);
}

TEST(ThreadPool, IsDestroyedAsleepOrAwake) {
  for (int i = 0; i < 20; ++i) {
    ThreadPool pool(3);
    if (i % 2 == 0) pool.Run(10, [](int64_t, int) {});
    if (i % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace
}  // namespace cachalot
