// Metrics: what a scraper sees of a server, under the names that vLLM's dashboards, routers and autoscalers use.
#ifndef CACHALOT_SERVER_METRICS_H_
#define CACHALOT_SERVER_METRICS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/request.h"
#include "engine/stats.h"

namespace cachalot {

// A Prometheus histogram. Any thread.
class Histogram {
 public:
  // `bounds` rise, and outlive the histogram.
  explicit Histogram(std::span<const double> bounds)
      : bounds_(bounds), counts_(std::make_unique<std::atomic<uint64_t>[]>(bounds.size() + 1)) {}
  void Observe(double value, uint64_t count = 1);
  // Appends the samples of `name` with `labels` ("model_name=\"x\"").
  void Render(const std::string& name, const std::string& labels, std::string* out) const;

 private:
  const std::span<const double> bounds_;
  std::unique_ptr<std::atomic<uint64_t>[]>
      counts_;  // of values up to each bound and above the one before; then the rest
  std::atomic<double> sum_ = 0;
};

// One generation (an answer; a request for n answers is n of them) as it goes by.
struct GenerationTimes {
  absl::Time start;                              // when it was submitted
  absl::Time last_token = absl::InfinitePast();  // InfinitePast before the first
};
struct GenerationSize {
  int64_t prompt_tokens = 0, max_tokens = 0, generated_tokens = 0;
};

// All methods may be called from any thread.
class Metrics {
 public:
  Metrics();

  // Tokens of one step; tells `times`.
  void OnTokens(int num_tokens, absl::Time now, GenerationTimes* times);
  // Sizes too are told at the end: a request that was refused had none.
  void OnEnd(FinishReason reason, const GenerationSize& size, const RequestTimes& engine_times, absl::Time now,
             const GenerationTimes& times);

  // The page, text format 0.0.4. What ranks count is told of each, the label `engine` being its number.
  std::string Render(const std::string& model_name, const std::vector<EngineStats>& ranks, const ModelInfo& model,
                     uint64_t dropped_log_messages) const;

 private:
  static constexpr size_t kNumReasons = 5;  // FinishReason's values

  std::array<std::atomic<uint64_t>, kNumReasons> num_ended_ = {};
  Histogram time_to_first_token_, inter_token_latency_, time_per_output_token_;
  Histogram e2e_latency_, queue_time_, inference_time_, prefill_time_, decode_time_;
  Histogram prompt_tokens_, generation_tokens_, params_max_tokens_, num_preemptions_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_METRICS_H_
