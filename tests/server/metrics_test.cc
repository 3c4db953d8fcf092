// The metrics page: histograms add up, names and labels are what dashboards ask for, every line is Prometheus's text.
#include "server/metrics.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace cachalot {
namespace {

// {sample with labels: value} of a page, each line of which must be a comment or a sample of a family announced before.
std::map<std::string, double> Samples(const std::string& page) {
  std::map<std::string, double> samples;
  std::set<std::string> families;
  for (absl::string_view line : absl::StrSplit(page, '\n', absl::SkipEmpty())) {
    if (line.substr(0, 7) == "# TYPE ") families.insert(std::vector<std::string>(absl::StrSplit(line, ' '))[2]);
    if (line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    double value = 0;
    EXPECT_TRUE(absl::SimpleAtod(line.substr(space + 1), &value)) << line;
    const std::string name(line.substr(0, line.find('{')));
    bool is_announced = families.count(name) > 0;
    for (const char* suffix : {"_bucket", "_sum", "_count"}) {
      const size_t at = name.size() - std::min(name.size(), std::string(suffix).size());
      is_announced = is_announced || (name.substr(at) == suffix && families.count(name.substr(0, at)) > 0);
    }
    EXPECT_TRUE(is_announced) << line;
    EXPECT_TRUE(samples.emplace(line.substr(0, space), value).second) << line;
  }
  return samples;
}

TEST(HistogramTest, CountsUpToEachBound) {
  static constexpr double kBounds[] = {1, 2.5, 10};
  Histogram histogram(kBounds);
  histogram.Observe(0);
  histogram.Observe(1);  // a bound belongs to its bucket
  histogram.Observe(2, 3);
  histogram.Observe(11);
  std::string text;
  histogram.Render("h", "a=\"b\"", &text);
  EXPECT_EQ(text,
            "h_bucket{a=\"b\",le=\"1\"} 2\n"
            "h_bucket{a=\"b\",le=\"2.5\"} 5\n"
            "h_bucket{a=\"b\",le=\"10\"} 5\n"
            "h_bucket{a=\"b\",le=\"+Inf\"} 6\n"
            "h_sum{a=\"b\"} 18\n"
            "h_count{a=\"b\"} 6\n");
}

// What a rate is computed from moves with every observation, however much has been observed.
TEST(HistogramTest, KeepsItsDigits) {
  static constexpr double kBounds[] = {.001, .025, 20000, 100000};
  Histogram histogram(kBounds);
  const auto render = [&histogram] {
    std::string text;
    histogram.Render("h", "", &text);
    return text;
  };
  for (const char* bound : {"0.001", "0.025", "20000", "100000"}) {
    EXPECT_NE(render().find(std::string("le=\"") + bound + "\"} 0\n"), std::string::npos) << bound;
  }
  histogram.Observe(1016106);
  EXPECT_NE(render().find("h_sum{} 1016106\n"), std::string::npos) << render();
  histogram.Observe(123456789012345);
  histogram.Observe(0.125);
  EXPECT_NE(render().find("h_sum{} 123456790028451.12\n"), std::string::npos) << render();
}

TEST(MetricsTest, GaugesAndCountersKeepTheirDigits) {
  EngineStats stats;
  stats.prompt_tokens = 1016106;
  stats.blocks_total = 1'000'003;
  stats.blocks_used = 333'335;
  const std::string page = Metrics().Render("m", {stats}, {}, 0);
  EXPECT_NE(page.find("vllm:prompt_tokens_total{model_name=\"m\",engine=\"0\"} 1016106\n"), std::string::npos);
  EXPECT_NE(page.find("vllm:kv_cache_usage_perc{model_name=\"m\",engine=\"0\"} 0.333333999998"), std::string::npos);
}

TEST(MetricsTest, RanksHaveTheirNumberAndAMetricItsSamplesTogether) {
  std::vector<EngineStats> ranks(2);
  ranks[0].running = 3;
  ranks[1].running = 4;
  ranks[0].blocks_total = ranks[1].blocks_total = 8;
  ModelInfo model;
  model.kv_cache_tokens = 1024;
  const std::string page = Metrics().Render("m", ranks, model, 0);
  EXPECT_NE(page.find("# TYPE vllm:num_requests_running gauge\n"
                      "vllm:num_requests_running{model_name=\"m\",engine=\"0\"} 3\n"
                      "vllm:num_requests_running{model_name=\"m\",engine=\"1\"} 4\n# HELP "),
            std::string::npos);
  EXPECT_NE(page.find("engine=\"1\",block_size=\"64\",num_gpu_blocks=\"8\""), std::string::npos);
  EXPECT_EQ(page.find("# TYPE vllm:num_requests_running", page.find("# TYPE vllm:num_requests_running") + 1),
            std::string::npos);
}

TEST(MetricsTest, OneGeneration) {
  Metrics metrics;
  const absl::Time start = absl::UnixEpoch();
  GenerationTimes times{.start = start};
  metrics.OnTokens(0, start + absl::Seconds(1), &times);  // nothing
  metrics.OnTokens(1, start + absl::Seconds(2), &times);
  metrics.OnTokens(2, start + absl::Seconds(3), &times);  // accepted drafts share the time
  const RequestTimes engine = {absl::Seconds(0.5), absl::Seconds(1.5), absl::Seconds(1), 1};
  metrics.OnEnd(FinishReason::kStop, {7, 16, 3}, engine, start + absl::Seconds(4), times);
  EngineStats stats;
  stats.running = 2;
  stats.blocks_total = 8;
  stats.blocks_used = 2;
  stats.step_rows.Add(5);
  stats.draft_tokens = 7;
  stats.accepted_draft_tokens = 6;
  stats.accepted_by_place = {4, 2};
  stats.drafts = 5;
  stats.prompt_tokens = 50;
  stats.cached_prompt_tokens = 20;
  stats.prefix_cache_queries = 45;
  stats.prefix_cache_evictions = 4;
  stats.blocks_idle = 3;
  ModelInfo model;
  model.kv_cache_tokens = 512;
  auto samples = Samples(metrics.Render("a \"b\"", {stats}, model, 3));
  const std::string labels = "{model_name=\"a \\\"b\\\"\",engine=\"0\"";
  const auto sample = [&](const std::string& name, const std::string& more = "") {
    const auto found = samples.find(name + labels + more + "}");
    EXPECT_NE(found, samples.end()) << name << more;
    return found == samples.end() ? -1 : found->second;
  };
  EXPECT_EQ(sample("vllm:num_requests_running"), 2);
  EXPECT_EQ(sample("vllm:kv_cache_usage_perc"), 0.25);
  EXPECT_EQ(sample("vllm:cache_config_info",
                   ",block_size=\"64\",num_gpu_blocks=\"8\",num_cpu_blocks=\"0\",kv_bytes_per_token=\"0\""),
            1);
  EXPECT_EQ(sample("vllm:spec_decode_num_draft_tokens_total"), 7);
  EXPECT_EQ(sample("vllm:spec_decode_num_accepted_tokens_total"), 6);
  EXPECT_EQ(sample("vllm:spec_decode_num_drafts_total"), 5);
  EXPECT_EQ(sample("vllm:spec_decode_num_accepted_tokens_per_pos_total", ",position=\"0\""), 4);
  EXPECT_EQ(sample("vllm:spec_decode_num_accepted_tokens_per_pos_total", ",position=\"1\""), 2);
  EXPECT_EQ(sample("vllm:prompt_tokens_total"), 50);
  EXPECT_EQ(sample("vllm:prompt_tokens_cached_total"), 20);
  EXPECT_EQ(sample("vllm:prompt_tokens_by_source_total", ",source=\"local_compute\""), 30);
  EXPECT_EQ(sample("vllm:prompt_tokens_by_source_total", ",source=\"local_cache_hit\""), 20);
  EXPECT_EQ(sample("vllm:prefix_cache_queries_total"), 45);
  EXPECT_EQ(sample("vllm:prefix_cache_hits_total"), 20);
  EXPECT_EQ(sample("cachalot:prefix_cache_evictions_total"), 4);
  EXPECT_EQ(sample("cachalot:prefix_cache_idle_blocks"), 3);
  EXPECT_EQ(sample("vllm:request_success_total", ",finished_reason=\"stop\""), 1);
  EXPECT_EQ(sample("vllm:request_success_total", ",finished_reason=\"abort\""), 0);
  EXPECT_EQ(sample("vllm:time_to_first_token_seconds_sum"), 2);
  EXPECT_EQ(sample("vllm:inter_token_latency_seconds_count"), 2);
  EXPECT_EQ(sample("vllm:inter_token_latency_seconds_sum"), 1);
  EXPECT_EQ(sample("vllm:request_time_per_output_token_seconds_sum"), 0.5);
  EXPECT_EQ(sample("vllm:e2e_request_latency_seconds_sum"), 4);
  EXPECT_EQ(sample("vllm:request_queue_time_seconds_sum"), 0.5);
  EXPECT_EQ(sample("vllm:request_inference_time_seconds_sum"), 2.5);
  EXPECT_EQ(sample("vllm:request_prompt_tokens_sum"), 7);
  EXPECT_EQ(sample("vllm:request_params_max_tokens_sum"), 16);
  EXPECT_EQ(sample("vllm:request_generation_tokens_sum"), 3);
  EXPECT_EQ(sample("vllm:request_num_preemptions_bucket", ",le=\"0\""), 0);
  EXPECT_EQ(sample("vllm:request_num_preemptions_bucket", ",le=\"1\""), 1);
  EXPECT_EQ(sample("vllm:iteration_tokens_total_bucket", ",le=\"1\""), 0);
  EXPECT_EQ(sample("vllm:iteration_tokens_total_bucket", ",le=\"8\""), 1);
  EXPECT_EQ(sample("vllm:iteration_tokens_total_sum"), 5);
  EXPECT_EQ(sample("cachalot:log_messages_dropped_total"), 3);
}

}  // namespace
}  // namespace cachalot
