// CallReactor without gRPC: events from the engine's output thread, cancellation and the end from others, all at once.
#include "server/grpc/call_reactor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <thread>

#include "tests/server/fake_engine.h"

namespace cachalot {
namespace {

// What gRPC's reactors have: it says when it is finished.
class FakeBase {
 public:
  virtual ~FakeBase() = default;
  virtual void OnDone() = 0;
  virtual void OnCancel() = 0;
};

struct Outcome {
  std::mutex mutex;
  std::condition_variable changed;
  std::optional<absl::Status> status;
  int num_tokens = 0;
};

class FakeReactor final : public CallReactor<FakeBase> {
 public:
  FakeReactor(LiveCalls* live_calls, Outcome* outcome) : CallReactor(nullptr, live_calls), outcome_(*outcome) {}

 private:
  absl::Status Take(int, GenerateEvent event) override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    num_tokens_ += static_cast<int>(event.tokens.size());
    return absl::OkStatus();
  }
  void Advance() override {
    absl::Status status;
    int num_tokens;
    {
      MutexLock lock(&mutex_);
      if (has_finished_ || (!is_cancelled_ && !status_.has_value())) return;
      has_finished_ = true;
      status = is_cancelled_ ? absl::CancelledError("") : *status_;
      num_tokens = num_tokens_;
    }
    std::lock_guard lock(outcome_.mutex);
    outcome_.status = status;
    outcome_.num_tokens = num_tokens;
    outcome_.changed.notify_all();
  }

  Outcome& outcome_;
  int num_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
};

TEST(CallReactorTest, EventsAndCancellationsAtOnce) {
  FakeEngine engine({.step = absl::Microseconds(50)});
  Generator generator(&engine, nullptr);
  LiveCalls live_calls;
  GenerateCall call;
  call.prompt = std::vector<int32_t>{1, 2, 3};
  call.sampling.max_tokens = 20;
  const auto plan = generator.Prepare(call);
  ASSERT_TRUE(plan.ok()) << plan.status();
  std::atomic<int> num_whole = 0, num_cancelled = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 20; ++round) {
        Outcome outcome;
        auto* reactor = new FakeReactor(&live_calls, &outcome);
        reactor->Start(&generator, *plan, 1 + round % 3);
        if ((i + round) % 2 == 0) reactor->OnCancel();
        std::unique_lock lock(outcome.mutex);
        outcome.changed.wait(lock, [&] { return outcome.status.has_value(); });
        if (outcome.status->ok()) {
          EXPECT_EQ(outcome.num_tokens, 20 * (1 + round % 3));
          ++num_whole;
        } else {
          ++num_cancelled;
        }
        lock.unlock();
        reactor->OnDone();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_whole, 80);
  EXPECT_EQ(num_cancelled, 80);
  live_calls.AwaitNone(absl::InfiniteDuration());
  EXPECT_TRUE(engine.AwaitIdle());
}

TEST(LiveCallsTest, Waits) {
  LiveCalls calls;
  calls.AwaitNone(absl::ZeroDuration());
  calls.Begin();
  calls.AwaitNone(absl::Milliseconds(1));  // returns all the same
  std::thread other([&] { calls.End(); });
  calls.AwaitNone(absl::InfiniteDuration());
  other.join();
}

}  // namespace
}  // namespace cachalot
