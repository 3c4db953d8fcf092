// ThreadPool: a parallel loop over task indices, for one caller at a time.
#ifndef CACHALOT_KERNELS_CPU_THREAD_POOL_H_
#define CACHALOT_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace cachalot {

// The caller is worker 0; `num_threads - 1` threads of the pool are workers 1, 2, ... They spin for some microseconds
// after a loop, since a forward pass is a train of short loops, and sleep after that.
class ThreadPool {
 public:
  using Body = absl::FunctionRef<void(int64_t task, int worker)>;

  explicit ThreadPool(int num_threads);  // 0: one per core
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls body(task, worker) for every task of [0, num_tasks), in any order, and returns when all are done. Tasks are
  // handed out one by one: make them worth a microsecond. One caller at a time; `body` must not call Run.
  void Run(int64_t num_tasks, Body body);

 private:
  void WorkerLoop(int worker);
  void RunTasks(int worker);

  // Tasks of the current loop: count in the upper half, next in the lower. A worker takes a task by compare-exchange
  // of both, so one that wakes late either finds nothing or takes a task of the loop that runs now: a loop cannot end,
  // nor `body_` change, while a task that was taken is not done.
  std::atomic<uint64_t> tickets_{0};
  std::atomic<uint32_t> num_done_{0};
  std::atomic<uint32_t> epoch_{0};  // counts loops: what workers sleep on
  std::atomic<bool> stop_{false};
  const Body* body_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_THREAD_POOL_H_
