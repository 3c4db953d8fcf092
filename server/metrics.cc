// Counters and histograms in Prometheus's text format. NOTE: written here because Debian has prometheus-cpp as a shared
// object only, and the binary needs nothing but libc.
#include "server/metrics.h"

#include <algorithm>
#include <charconv>
#include <type_traits>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"

namespace cachalot {
namespace {

// The bounds of vLLM's histograms, so that its dashboards' quantiles mean the same.
constexpr double kFirstToken[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                  1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
constexpr double kTokenGap[] = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
constexpr double kRequestTime[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                   30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
constexpr double kTokens[] = {1,    2,    5,    10,    20,    50,    100,    200,   500,
                              1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
constexpr double kPreemptions[] = {0, 1, 2, 5, 10, 20};

// NOTE: absl::StrCat keeps six digits of a floating-point number; a sum of more would stand still, then jump.
std::string Digits(double value) {
  char text[400];  // the largest has 309 digits before the point
  const auto end = std::to_chars(text, text + sizeof(text), value, std::chars_format::fixed).ptr;
  return std::string(text, end);
}
template <typename Integer>
requires std::is_integral_v<Integer> std::string Digits(Integer value) { return absl::StrCat(value); }

class Page {
 public:
  explicit Page(const std::string& model_name) : model_name_(model_name) { SetEngine(0); }

  // Of what follows.
  void SetEngine(size_t number) { labels_ = absl::StrCat("model_name=\"", model_name_, "\",engine=\"", number, "\""); }
  // What follows are samples of this metric; all of its samples stand together, whenever they come.
  void Header(const char* name, const char* type, const char* help) {
    const auto [it, is_new] = place_.try_emplace(name, families_.size());
    if (is_new) families_.push_back(absl::StrCat("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n"));
    family_ = it->second;
  }
  template <typename Number>
  void Sample(const char* name, Number value, const std::string& more_labels = "") {
    absl::StrAppend(&families_[family_], name, "{", labels_, more_labels, "} ", Digits(value), "\n");
  }
  template <typename Number>
  void Gauge(const char* name, Number value, const char* help) {
    Header(name, "gauge", help);
    Sample(name, value);
  }
  void Counter(const char* name, uint64_t value, const char* help) {
    Header(name, "counter", help);
    Sample(name, value);
  }
  void Add(const char* name, const Histogram& histogram, const char* help) {
    Header(name, "histogram", help);
    histogram.Render(name, labels_, &families_[family_]);
  }
  std::string text() const { return absl::StrJoin(families_, ""); }

 private:
  const std::string model_name_;
  std::string labels_;
  std::vector<std::string> families_;
  absl::flat_hash_map<std::string, size_t> place_;
  size_t family_ = 0;
};

std::string LabelValue(const std::string& text) {
  return absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"\"", "\\\""}, {"\n", "\\n"}});
}

// A histogram that the engine keeps.
void RenderStepRows(const StepRowsHistogram& rows, Page* page) {
  page->Header("vllm:iteration_tokens_total", "histogram", "Tokens, of prompts and generated, of a step.");
  for (size_t i = 0; i < rows.kBounds.size(); ++i) {
    page->Sample("vllm:iteration_tokens_total_bucket", rows.at_most[i], absl::StrCat(",le=\"", rows.kBounds[i], "\""));
  }
  page->Sample("vllm:iteration_tokens_total_bucket", rows.count, ",le=\"+Inf\"");
  page->Sample("vllm:iteration_tokens_total_sum", rows.sum);
  page->Sample("vllm:iteration_tokens_total_count", rows.count);
}

void RenderRank(const EngineStats& stats, const ModelInfo& model, int block_size, Page* page) {
  page->Gauge("vllm:num_requests_running", stats.running, "Sequences that steps compute.");
  page->Gauge("vllm:num_requests_waiting", stats.waiting, "Requests that wait for their first step.");
  page->Header("vllm:num_requests_waiting_by_reason", "gauge", "What those that wait, wait for.");
  page->Sample("vllm:num_requests_waiting_by_reason", stats.waiting_for_slots, ",reason=\"slots\"");
  page->Sample("vllm:num_requests_waiting_by_reason", stats.waiting_for_blocks, ",reason=\"capacity\"");
  page->Gauge("vllm:kv_cache_usage_perc",
              stats.blocks_total == 0 ? 0.0 : static_cast<double>(stats.blocks_used) / stats.blocks_total,
              "Share of the KV cache in use, 0 to 1.");
  page->Header("vllm:cache_config_info", "gauge", "The KV cache.");
  page->Sample("vllm:cache_config_info", 1,
               absl::StrCat(",block_size=\"", block_size, "\",num_gpu_blocks=\"", stats.blocks_total,
                            "\",num_cpu_blocks=\"0\",kv_bytes_per_token=\"", model.kv_bytes_per_token, "\""));
  page->Counter("vllm:num_preemptions_total", stats.preemptions, "Sequences put back to make room.");
  page->Counter("vllm:prompt_tokens_total", stats.prompt_tokens,
                "Prompt tokens, cached or computed, each prompt once.");
  page->Counter("vllm:prompt_tokens_cached_total", stats.cached_prompt_tokens, "Those found in the prefix cache.");
  page->Header("vllm:prompt_tokens_by_source_total", "counter", "Where they came from.");
  page->Sample("vllm:prompt_tokens_by_source_total", stats.prompt_tokens - stats.cached_prompt_tokens,
               ",source=\"local_compute\"");
  page->Sample("vllm:prompt_tokens_by_source_total", stats.cached_prompt_tokens, ",source=\"local_cache_hit\"");
  page->Counter("vllm:prefix_cache_queries_total", stats.prefix_cache_queries,
                "Tokens looked for in the prefix cache.");
  page->Counter("vllm:prefix_cache_hits_total", stats.cached_prompt_tokens, "Tokens found there.");
  page->Counter("cachalot:prefix_cache_evictions_total", stats.prefix_cache_evictions, "Blocks evicted from it.");
  page->Gauge("cachalot:prefix_cache_idle_blocks", stats.blocks_idle, "Blocks in it that no request uses.");
  page->Counter("vllm:prompt_tokens_recomputed_total", stats.recomputed_tokens, "Tokens computed again after that.");
  page->Counter("vllm:generation_tokens_total", stats.generated_tokens, "Tokens generated.");
  page->Counter("vllm:spec_decode_num_drafts_total", stats.drafts,
                "Steps of a sequence in which drafts were verified.");
  page->Counter("vllm:spec_decode_num_draft_tokens_total", stats.draft_tokens, "Drafts that were verified.");
  page->Counter("vllm:spec_decode_num_accepted_tokens_total", stats.accepted_draft_tokens, "Those that were right.");
  page->Header("vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter",
               "By their place among a step's drafts.");
  for (size_t i = 0; i < stats.accepted_by_place.size() && stats.accepted_by_place[i] > 0; ++i) {
    page->Sample("vllm:spec_decode_num_accepted_tokens_per_pos_total", stats.accepted_by_place[i],
                 absl::StrCat(",position=\"", i, "\""));
  }
  RenderStepRows(stats.step_rows, page);
}

}  // namespace

void Histogram::Observe(double value, uint64_t count) {
  const size_t bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_[bucket].fetch_add(count, std::memory_order_relaxed);
  sum_.fetch_add(value * static_cast<double>(count), std::memory_order_relaxed);
}

void Histogram::Render(const std::string& name, const std::string& labels, std::string* out) const {
  uint64_t total = 0;
  for (size_t i = 0; i <= bounds_.size(); ++i) {
    total += counts_[i].load(std::memory_order_relaxed);
    absl::StrAppend(out, name, "_bucket{", labels, ",le=\"");
    if (i < bounds_.size()) {
      absl::StrAppend(out, Digits(bounds_[i]));
    } else {
      absl::StrAppend(out, "+Inf");
    }
    absl::StrAppend(out, "\"} ", total, "\n");
  }
  absl::StrAppend(out, name, "_sum{", labels, "} ", Digits(sum_.load(std::memory_order_relaxed)), "\n");
  absl::StrAppend(out, name, "_count{", labels, "} ", total, "\n");
}

Metrics::Metrics()
    : time_to_first_token_(kFirstToken),
      inter_token_latency_(kTokenGap),
      time_per_output_token_(kTokenGap),
      e2e_latency_(kRequestTime),
      queue_time_(kRequestTime),
      inference_time_(kRequestTime),
      prefill_time_(kRequestTime),
      decode_time_(kRequestTime),
      prompt_tokens_(kTokens),
      generation_tokens_(kTokens),
      params_max_tokens_(kTokens),
      num_preemptions_(kPreemptions) {}

// A step that brings several tokens (accepted drafts) spreads its time over them.
void Metrics::OnTokens(int num_tokens, absl::Time now, GenerationTimes* times) {
  if (num_tokens == 0) return;
  if (times->last_token == absl::InfinitePast()) {
    time_to_first_token_.Observe(absl::ToDoubleSeconds(now - times->start));
    --num_tokens;
  }
  if (num_tokens > 0 && times->last_token != absl::InfinitePast()) {
    inter_token_latency_.Observe(absl::ToDoubleSeconds(now - times->last_token) / num_tokens, num_tokens);
  }
  times->last_token = now;
}

void Metrics::OnEnd(FinishReason reason, const GenerationSize& size, const RequestTimes& engine_times, absl::Time now,
                    const GenerationTimes& times) {
  num_ended_[static_cast<size_t>(reason)].fetch_add(1, std::memory_order_relaxed);
  prompt_tokens_.Observe(static_cast<double>(size.prompt_tokens));
  params_max_tokens_.Observe(static_cast<double>(size.max_tokens));
  e2e_latency_.Observe(absl::ToDoubleSeconds(now - times.start));
  queue_time_.Observe(absl::ToDoubleSeconds(engine_times.queued));
  prefill_time_.Observe(absl::ToDoubleSeconds(engine_times.prefill));
  decode_time_.Observe(absl::ToDoubleSeconds(engine_times.decode));
  inference_time_.Observe(absl::ToDoubleSeconds(engine_times.prefill + engine_times.decode));
  num_preemptions_.Observe(engine_times.num_preemptions);
  generation_tokens_.Observe(static_cast<double>(size.generated_tokens));
  if (size.generated_tokens > 1) {
    time_per_output_token_.Observe(absl::ToDoubleSeconds(engine_times.decode) /
                                   static_cast<double>(size.generated_tokens - 1));
  }
}

std::string Metrics::Render(const std::string& model_name, const std::vector<EngineStats>& ranks,
                            const ModelInfo& model, uint64_t dropped_log_messages) const {
  Page page(LabelValue(model_name));
  int num_blocks = 0;
  for (const EngineStats& rank : ranks) num_blocks += rank.blocks_total;
  for (size_t i = 0; i < ranks.size(); ++i) {
    page.SetEngine(model.first_rank + i);
    RenderRank(ranks[i], model, model.kv_cache_tokens / std::max(num_blocks, 1), &page);
  }
  page.SetEngine(model.first_rank);
  page.Header("vllm:request_success_total", "counter", "Answers that ended, by how.");
  constexpr std::pair<FinishReason, const char*> kReasons[] = {{FinishReason::kStop, "stop"},
                                                               {FinishReason::kLength, "length"},
                                                               {FinishReason::kCancelled, "abort"},
                                                               {FinishReason::kError, "error"}};
  for (const auto& [reason, name] : kReasons) {
    page.Sample("vllm:request_success_total", num_ended_[static_cast<size_t>(reason)].load(std::memory_order_relaxed),
                absl::StrCat(",finished_reason=\"", name, "\""));
  }
  page.Add("vllm:time_to_first_token_seconds", time_to_first_token_, "From a request's arrival to its first token.");
  page.Add("vllm:inter_token_latency_seconds", inter_token_latency_, "Between a token and the one before.");
  page.Add("vllm:request_time_per_output_token_seconds", time_per_output_token_, "The mean of that over an answer.");
  page.Add("vllm:e2e_request_latency_seconds", e2e_latency_, "From arrival to the last token.");
  page.Add("vllm:request_queue_time_seconds", queue_time_, "From arrival to the first step.");
  page.Add("vllm:request_inference_time_seconds", inference_time_, "From the first step to the last token.");
  page.Add("vllm:request_prefill_time_seconds", prefill_time_, "From the first step to the first token.");
  page.Add("vllm:request_decode_time_seconds", decode_time_, "From the first token to the last.");
  page.Add("vllm:request_prompt_tokens", prompt_tokens_, "Tokens of a prompt.");
  page.Add("vllm:request_generation_tokens", generation_tokens_, "Tokens of an answer.");
  page.Add("vllm:request_params_max_tokens", params_max_tokens_, "Tokens asked for at most.");
  page.Add("vllm:request_num_preemptions", num_preemptions_, "How often an answer was preempted.");
  page.Counter("cachalot:log_messages_dropped_total", dropped_log_messages, "Log messages that nobody read in time.");
  return page.text();
}

}  // namespace cachalot
