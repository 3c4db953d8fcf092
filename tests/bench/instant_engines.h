// Engines that answer at once, to measure what is around an engine.
#ifndef CACHALOT_TESTS_BENCH_INSTANT_ENGINES_H_
#define CACHALOT_TESTS_BENCH_INSTANT_ENGINES_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace cachalot {

using Clock = std::chrono::steady_clock;

// Waits until `num_streams` requests have come, then gives every one a token a step.
class InstantEngine : public Engine {
 public:
  // It runs at most `steps_ahead` steps ahead of the clients, lest they be sent several tokens in one event.
  InstantEngine(int num_streams, int num_tokens, int steps_ahead, std::vector<int32_t> vocabulary)
      : num_streams_(num_streams),
        num_tokens_(num_tokens),
        steps_ahead_(steps_ahead),
        vocabulary_(std::move(vocabulary)) {
    model_.model_type = "instant";
    model_.vocab_size = *std::max_element(vocabulary_.begin(), vocabulary_.end()) + 1;
    model_.max_model_len = 1 << 20;
    thread_ = std::thread([this] { Run(); });
  }
  ~InstantEngine() override {
    {
      std::lock_guard lock(mutex_);
      is_stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  absl::StatusOr<RequestId> Submit(Request, DeltaSink sink) override {
    std::lock_guard lock(mutex_);
    sinks_.push_back(std::move(sink));
    changed_.notify_all();
    return sinks_.size();
  }
  void Cancel(RequestId) override {}
  void ResetPrefixCache() override {}
  std::vector<EngineStats> rank_stats() const override { return {EngineStats()}; }
  const ModelInfo& model() const override { return model_; }
  absl::Status health() const override { return absl::OkStatus(); }

  // The clients have seen `count` events in all.
  void Seen(int64_t count) { num_seen_.store(count, std::memory_order_release); }
  Clock::time_point begin() const { return begin_; }

 private:
  void Run() {
    while (true) {
      std::vector<DeltaSink> sinks;
      {
        std::unique_lock lock(mutex_);
        const auto is_full = [this] { return is_stopping_ || static_cast<int>(sinks_.size()) == num_streams_; };
        changed_.wait(lock, is_full);
        if (is_stopping_) return;
        sinks.swap(sinks_);
      }
      Serve(sinks);
    }
  }

  void Serve(const std::vector<DeltaSink>& sinks) {
    num_seen_ = 0;
    begin_ = Clock::now();
    std::minstd_rand random(1);
    for (int t = 0; t < num_tokens_; ++t) {
      while (num_seen_.load(std::memory_order_acquire) < int64_t{t - steps_ahead_} * num_streams_) {
        std::this_thread::yield();
      }
      for (const DeltaSink& sink : sinks) {
        Delta delta;
        delta.tokens = {vocabulary_[random() % vocabulary_.size()]};
        if (t + 1 == num_tokens_) delta.finish_reason = FinishReason::kLength;
        sink(std::move(delta));
      }
    }
  }

  const int num_streams_, num_tokens_, steps_ahead_;
  const std::vector<int32_t> vocabulary_;
  ModelInfo model_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<DeltaSink> sinks_;
  bool is_stopping_ = false;
  std::atomic<int64_t> num_seen_ = 0;
  Clock::time_point begin_;
  std::thread thread_;
};

// One stream (prompt {1}) is given tokens as fast as it is read; those of prompt {2} nothing; those of prompt {3} 100
// tokens at once, then one a second. All end with the first.
class MixedEngine : public Engine {
 public:
  MixedEngine(int num_tokens, int steps_ahead, std::vector<int32_t> vocabulary)
      : num_tokens_(num_tokens), steps_ahead_(steps_ahead), vocabulary_(std::move(vocabulary)) {
    model_.vocab_size = *std::max_element(vocabulary_.begin(), vocabulary_.end()) + 1;
    model_.max_model_len = 1 << 20;
    thread_ = std::thread([this] { Run(); });
  }
  ~MixedEngine() override { Stop(); }
  void Stop() {
    is_stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }

  absl::StatusOr<RequestId> Submit(Request request, DeltaSink sink) override {
    std::lock_guard lock(mutex_);
    const int32_t kind = request.prompt[0];
    arrived_.push_back({kind, std::move(sink)});
    return ++next_id_;
  }
  void Cancel(RequestId) override {}
  void ResetPrefixCache() override {}
  std::vector<EngineStats> rank_stats() const override { return {EngineStats()}; }
  const ModelInfo& model() const override { return model_; }
  absl::Status health() const override { return absl::OkStatus(); }
  void Seen(int64_t count) { num_seen_.store(count, std::memory_order_release); }
  int num_arrived() const { return num_arrived_; }

 private:
  struct Stream {
    int32_t kind;
    DeltaSink sink;
  };

  void Give(const DeltaSink& sink, bool is_last) {
    Delta delta;
    delta.tokens = {vocabulary_[next_token_++ % vocabulary_.size()]};
    if (is_last) delta.finish_reason = FinishReason::kLength;
    sink(std::move(delta));
  }

  void Run() {
    std::vector<DeltaSink> slow, others;
    DeltaSink fast;
    int num_given = 0;
    size_t next_slow = 0;
    auto last_slow = Clock::now();
    while (!is_stopping_) {
      {
        std::lock_guard lock(mutex_);
        for (Stream& stream : arrived_) {
          if (stream.kind == 1) {
            fast = std::move(stream.sink);
            num_given = 0;
            num_seen_ = 0;
          } else {
            for (int i = 0; i < 100 && stream.kind == 3; ++i) Give(stream.sink, false);
            (stream.kind == 3 ? slow : others).push_back(std::move(stream.sink));
          }
          ++num_arrived_;
        }
        arrived_.clear();
      }
      if (fast != nullptr && num_seen_.load(std::memory_order_acquire) >= num_given - steps_ahead_) {
        Give(fast, ++num_given == num_tokens_);
        if (num_given == num_tokens_) fast = nullptr;
      }
      // A second is shared out among the slow ones.
      if (!slow.empty() && Clock::now() - last_slow >= std::chrono::nanoseconds(1'000'000'000) / slow.size()) {
        last_slow = Clock::now();
        Give(slow[next_slow++ % slow.size()], false);
      }
      if (fast == nullptr) std::this_thread::yield();
    }
    for (const auto* streams : {&slow, &others}) {
      for (const DeltaSink& sink : *streams) Give(sink, true);
    }
  }

  const int num_tokens_, steps_ahead_;
  const std::vector<int32_t> vocabulary_;
  ModelInfo model_;
  std::mutex mutex_;
  std::vector<Stream> arrived_;
  RequestId next_id_ = 0;
  std::atomic<bool> is_stopping_ = false;
  std::atomic<int64_t> num_seen_ = 0;
  std::atomic<int> num_arrived_ = 0;
  uint64_t next_token_ = 0;
  std::thread thread_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_BENCH_INSTANT_ENGINES_H_
