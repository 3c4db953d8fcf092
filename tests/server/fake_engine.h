// FakeEngine: an Engine of a few lines: tokens from a script, at a chosen pace, and a record of what was asked of it.
#ifndef CACHALOT_TESTS_SERVER_FAKE_ENGINE_H_
#define CACHALOT_TESTS_SERVER_FAKE_ENGINE_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/engine.h"

namespace cachalot {

struct FakeEngineOptions {
  std::vector<int32_t> script = {10, 11, 12};  // the tokens of every answer, over and over
  bool add_choice = false;                     // token + choice instead
  int tokens_per_delta = 1;
  absl::Duration step = absl::ZeroDuration();
  int max_requests = 1000;  // one more is refused
  int fail_after = -1;      // tokens until a request ends with Internal
  int max_model_len = 256;
  int vocab_size = 320;
  int max_waiting = 4096;
  int cached_tokens = 0;  // of each prompt; of choice c, c more
};

class FakeEngine : public Engine {
 public:
  static constexpr int32_t kEos = 1;

  explicit FakeEngine(FakeEngineOptions options = {}) : options_(std::move(options)) {
    model_.model_type = "fake";
    model_.backend = "fake";
    model_.vocab_size = options_.vocab_size;
    model_.max_model_len = options_.max_model_len;
    model_.max_waiting = options_.max_waiting;
    thread_ = std::thread([this] { Run(); });
  }
  ~FakeEngine() override {
    {
      std::lock_guard lock(mutex_);
      is_stopping_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  // The made-up log-probabilities: of a token, and of the j-th alternative to it.
  static float LogprobOf(int32_t token) { return -0.125f * static_cast<float>(1 + token % 7); }
  static std::pair<int32_t, float> Alternative(int32_t token, int j) { return {token + 1 + j, -0.25f * (j + 1.f)}; }

  absl::StatusOr<RequestId> Submit(Request request, DeltaSink sink) override {
    std::lock_guard lock(mutex_);
    requests_.push_back(request);
    if (static_cast<int>(live_.size()) >= options_.max_requests) return absl::ResourceExhaustedError("queue full");
    const RequestId id = next_id_++;
    live_[id] = {std::move(request), std::move(sink), 0, 1, false};
    changed_.notify_all();
    return id;
  }
  void Cancel(RequestId id) override {
    std::lock_guard lock(mutex_);
    cancels_.push_back(id);
    changed_.notify_all();
    if (const auto found = live_.find(id); found != live_.end()) found->second.is_cancelled = true;
  }
  void ResetPrefixCache() override {
    std::lock_guard lock(mutex_);
    ++num_resets_;
  }
  int num_resets() const {
    std::lock_guard lock(mutex_);
    return num_resets_;
  }
  std::vector<EngineStats> rank_stats() const override { return {EngineStats()}; }
  const ModelInfo& model() const override { return model_; }
  absl::Status health() const override {
    std::lock_guard lock(mutex_);
    return health_;
  }

  void set_health(absl::Status health) {
    std::lock_guard lock(mutex_);
    health_ = std::move(health);
  }
  std::vector<Request> requests() const {
    std::lock_guard lock(mutex_);
    return requests_;
  }
  int num_cancels() const {
    std::lock_guard lock(mutex_);
    return static_cast<int>(cancels_.size());
  }
  // True once `count` requests were cancelled.
  bool AwaitCancels(int count, absl::Duration timeout = absl::Seconds(10)) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                             [this, count] { return static_cast<int>(cancels_.size()) >= count; });
  }
  bool AwaitIdle(absl::Duration timeout = absl::Seconds(10)) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return live_.empty(); });
  }

 private:
  struct Live {
    Request request;
    DeltaSink sink;
    int num_generated = 0;
    size_t num_scored = 1;  // prompt tokens
    bool is_cancelled = false;
  };

  void Run() {
    for (bool is_stopping = false; !is_stopping; absl::SleepFor(options_.step)) {
      std::vector<std::pair<DeltaSink, Delta>> news;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return is_stopping_ || !live_.empty(); });
        is_stopping = is_stopping_;
        for (auto it = live_.begin(); it != live_.end();) {
          Delta delta = is_stopping ? ErrorDelta(absl::UnavailableError("the engine stops")) : Step(&it->second);
          const bool has_ended = delta.finish_reason != FinishReason::kNone;
          news.emplace_back(it->second.sink, std::move(delta));
          it = has_ended ? live_.erase(it) : std::next(it);
        }
        changed_.notify_all();
      }
      for (auto& [sink, delta] : news) sink(std::move(delta));
    }
  }

  static Delta ErrorDelta(absl::Status error) {
    Delta delta;
    delta.finish_reason = FinishReason::kError;
    delta.error = std::move(error);
    return delta;
  }
  static TokenLogprob Score(int32_t token, int num_top) {
    TokenLogprob score{.token = token, .logprob = LogprobOf(token), .top = {}};
    for (int j = 0; j < num_top; ++j) score.top.push_back(Alternative(token, j));
    return score;
  }

  Delta Step(Live* live) const {
    Delta delta;
    const int choice = static_cast<int>(live->request.sampling.choice);
    delta.num_cached_tokens = options_.cached_tokens > 0 ? options_.cached_tokens + choice : 0;
    const SamplingParams& sampling = live->request.sampling;
    if (live->is_cancelled) {
      delta.finish_reason = FinishReason::kCancelled;
      return delta;
    }
    const std::vector<int32_t>& prompt = live->request.prompt;
    const size_t num_to_score = sampling.prompt_logprobs >= 0 ? prompt.size() : 1;
    if (live->num_scored < num_to_score) {  // two a step, so that they come in several deltas
      for (int i = 0; i < 2 && live->num_scored < num_to_score; ++i) {
        delta.prompt_logprobs.push_back(Score(prompt[live->num_scored++], sampling.prompt_logprobs));
      }
      return delta;
    }
    for (int i = 0; i < options_.tokens_per_delta && delta.finish_reason == FinishReason::kNone; ++i) {
      if (live->num_generated == options_.fail_after) return ErrorDelta(absl::InternalError("the fake engine fails"));
      if (live->num_generated < sampling.max_tokens) Generate(live, &delta);
      const bool is_full = static_cast<int>(prompt.size()) + live->num_generated >= options_.max_model_len;
      if (delta.finish_reason == FinishReason::kNone && (live->num_generated >= sampling.max_tokens || is_full)) {
        delta.finish_reason = FinishReason::kLength;
      }
    }
    return delta;
  }

  void Generate(Live* live, Delta* delta) const {
    const SamplingParams& sampling = live->request.sampling;
    const std::vector<int32_t>& stop_ids = sampling.stop_token_ids;
    int32_t token = options_.script[live->num_generated++ % options_.script.size()];
    if (options_.add_choice) token += static_cast<int32_t>(sampling.choice);
    delta->tokens.push_back(token);
    if (sampling.logprobs >= 0) delta->logprobs.push_back(Score(token, sampling.logprobs));
    const bool is_stop =
        (token == kEos && !sampling.ignore_eos) || std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end();
    if (!is_stop) return;
    delta->finish_reason = FinishReason::kStop;
    delta->stop_token = token;
  }

  const FakeEngineOptions options_;
  ModelInfo model_;
  mutable std::mutex mutex_;  // guards all below
  mutable std::condition_variable changed_;
  absl::Status health_;
  std::map<RequestId, Live> live_;
  std::vector<Request> requests_;
  std::vector<RequestId> cancels_;
  int num_resets_ = 0;
  RequestId next_id_ = 1;
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_FAKE_ENGINE_H_
