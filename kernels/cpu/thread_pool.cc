// ThreadPool: tickets by compare-exchange, spinning before sleeping.
#include "kernels/cpu/thread_pool.h"

#include <algorithm>
#include <chrono>

#include "kernels/check.h"

namespace cachalot {
namespace {

constexpr std::chrono::microseconds kSpinTime{50};
constexpr uint64_t kMaxTasks = uint64_t{1} << 31;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or the spin time is over; whether it is done.
template <typename Done>
bool SpinUntil(Done done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads <= 0) num_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int worker = 1; worker < num_threads; ++worker) {
    threads_.emplace_back([this, worker] { WorkerLoop(worker); });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::Run(int64_t num_tasks, Body body) {
  if (num_tasks <= 1 || threads_.empty()) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  CHECK(static_cast<uint64_t>(num_tasks) < kMaxTasks, "{} tasks", num_tasks);
  body_ = &body;
  num_done_.store(0, std::memory_order_relaxed);
  tickets_.store(static_cast<uint64_t>(num_tasks) << 32, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  RunTasks(0);

  // Wait for the tasks that others took.
  const uint32_t want = static_cast<uint32_t>(num_tasks);
  if (SpinUntil([&] { return num_done_.load(std::memory_order_acquire) == want; })) return;
  for (uint32_t done; (done = num_done_.load(std::memory_order_acquire)) != want;) num_done_.wait(done);
}

void ThreadPool::RunTasks(int worker) {
  uint64_t tickets = tickets_.load(std::memory_order_acquire);
  while (true) {
    const uint32_t task = static_cast<uint32_t>(tickets), count = static_cast<uint32_t>(tickets >> 32);
    if (task >= count) return;
    if (!tickets_.compare_exchange_weak(tickets, tickets + 1, std::memory_order_acq_rel)) continue;
    (*body_)(task, worker);
    // NOTE: only worker 0 waits, and only for the last task, so the others need not wake anyone.
    const uint32_t done = num_done_.fetch_add(1, std::memory_order_acq_rel) + 1;
    if (done == count && worker != 0) num_done_.notify_one();
    tickets = tickets_.load(std::memory_order_acquire);
  }
}

void ThreadPool::WorkerLoop(int worker) {
  while (true) {
    const uint32_t seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    RunTasks(worker);
    if (!SpinUntil([&] { return epoch_.load(std::memory_order_acquire) != seen; })) epoch_.wait(seen);
  }
}

}  // namespace cachalot
