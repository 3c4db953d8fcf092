// The engine against float64 references: log-probabilities, greedy choices, both caches, and bit-for-bit invariances.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "tests/engine/golden.h"

namespace cachalot {
namespace {

constexpr float kRouterMargin = 1e-2f;  // closer expert choices may fall differently under a rounded cache
constexpr float kTop1Margin = 0.05f;

EngineOptions OptionsFor(const Golden& golden, const std::string& kv_dtype = "f32") {
  EngineOptions options;
  options.model_dir = golden.model_dir;
  options.device = "cpu";
  options.kv_cache_dtype = kv_dtype;
  options.max_model_len = static_cast<int>(golden.prompts.back().tokens.size()) + 64;
  for (const GoldenPrompt& p : golden.prompts) {
    options.max_model_len = std::max(options.max_model_len, static_cast<int>(p.tokens.size()) + 64);
  }
  options.max_sequences = 8;
  return options;
}

// Over all positions of all prompts of a case.
struct Difference {
  double max_logprob = 0;  // where the router margin allows
  int num_positions = 0, num_excluded = 0;
  int num_top1 = 0, num_top1_wrong = 0;  // where both margins allow
};

Difference Compare(const Golden& golden, const std::vector<Answer>& answers, float router_margin) {
  Difference d;
  for (size_t i = 0; i < golden.prompts.size(); ++i) {
    const GoldenPrompt& p = golden.prompts[i];
    const Answer& answer = answers[i];
    EXPECT_EQ(answer.prompt_logprobs.size(), p.tokens.size() - 1);
    EXPECT_EQ(answer.tokens.size(), 1u);
    for (size_t j = 0; j < p.tokens.size(); ++j) {
      ++d.num_positions;
      if (p.router_margin[j] < router_margin) {
        ++d.num_excluded;
        continue;
      }
      const bool is_last = j + 1 == p.tokens.size();
      const int32_t top1 = is_last ? answer.tokens[0] : answer.prompt_logprobs[j].top[0].first;
      if (p.top1_margin[j] >= kTop1Margin) {
        ++d.num_top1;
        d.num_top1_wrong += top1 != p.top1[j];
      }
      if (!is_last) {
        d.max_logprob = std::max(d.max_logprob, std::abs(answer.prompt_logprobs[j].logprob - p.logprobs[j]));
        EXPECT_EQ(answer.prompt_logprobs[j].token, p.tokens[j + 1]);
        continue;
      }
      for (const auto& [token, logprob] : answer.logprobs[0].top) {
        d.max_logprob = std::max(d.max_logprob, std::abs(logprob - p.last_logprobs[token]));
      }
    }
  }
  return d;
}

Difference RunCase(const Golden& golden, const EngineOptions& options, float router_margin) {
  auto engine = MakeEngine(options);
  std::vector<Request> requests;
  for (const GoldenPrompt& p : golden.prompts) requests.push_back(ScoreRequest(p.tokens));
  return Compare(golden, RunAll(*engine, requests), router_margin);
}

void Print(const char* what, const Difference& d) {
  std::printf(
      "[ measured ] %s: max log-probability difference %.2e over %d positions, %d (%.1f %%) excluded; greedy "
      "choice wrong at %d of %d\n",
      what, d.max_logprob, d.num_positions, d.num_excluded, 100.0 * d.num_excluded / d.num_positions, d.num_top1_wrong,
      d.num_top1);
}

class GoldenTest : public testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Family, GoldenTest,
                         testing::Values("v3_like", "v3_heads", "moonlight", "v2_lite", "v2", "kimi", "v31", "odd",
                                         "dense", "long"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(GoldenTest, F32CacheMatchesTheReference) {
  const Golden golden = LoadGolden(GetParam());
  const Difference d = RunCase(golden, OptionsFor(golden), 0);
  Print("f32 cache", d);
  EXPECT_LT(d.max_logprob, 2e-3);
  EXPECT_EQ(d.num_top1_wrong, 0);
  EXPECT_GT(d.num_top1, 0);
}

TEST_P(GoldenTest, Bf16CacheMatchesTheReference) {
  const Golden golden = LoadGolden(GetParam());
  const Difference d = RunCase(golden, OptionsFor(golden, "bf16"), kRouterMargin);
  Print("bf16 cache", d);
  EXPECT_LT(d.max_logprob, 3e-2);
  EXPECT_EQ(d.num_top1_wrong, 0);
  EXPECT_LT(d.num_excluded, 0.25 * d.num_positions);
}

// Quantised activations, against a reference that quantises in float64. The model is chaotic there: a rounding that
// falls the other way is a step of 2^-3 in one value, so single positions tell nothing and medians tell much: the
// median to the right reference is a fraction of the median to the unquantised one.
class QuantisedTest : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Family, QuantisedTest, testing::Values("v3_like", "v3_heads", "v31"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(QuantisedTest, ActivationsAreRoundedAsTheGpuWill) {
  const Golden golden = LoadGolden(GetParam(), "aq.");
  const Golden plain = LoadGolden(GetParam());
  EngineOptions options = OptionsFor(golden);
  options.activation = "fp8-f32";
  auto engine = MakeEngine(options);
  std::vector<double> to_quantised, to_plain;
  for (size_t i = 0; i < golden.prompts.size(); ++i) {
    const Answer answer = RunAll(*engine, {ScoreRequest(golden.prompts[i].tokens)})[0];
    for (size_t j = 0; j < answer.prompt_logprobs.size(); ++j) {
      to_quantised.push_back(std::abs(answer.prompt_logprobs[j].logprob - golden.prompts[i].logprobs[j]));
      to_plain.push_back(std::abs(answer.prompt_logprobs[j].logprob - plain.prompts[i].logprobs[j]));
    }
  }
  const auto median = [](std::vector<double>& v) {
    std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
    return v[v.size() / 2];
  };
  const double quantised = median(to_quantised), unquantised = median(to_plain);
  std::printf("[ measured ] median difference %.4f to the quantised reference, %.4f to the unquantised one\n",
              quantised, unquantised);
  EXPECT_LT(quantised, 0.05);
  EXPECT_LT(quantised, 0.5 * unquantised);
}

TEST_P(GoldenTest, GreedyContinuation) {
  const Golden golden = LoadGolden(GetParam());
  if (golden.greedy_prompt.empty()) GTEST_SKIP() << "this case has no continuation; its prompt alone is the point";
  auto engine = MakeEngine(OptionsFor(golden));
  Request request = ScoreRequest(golden.greedy_prompt);
  request.sampling.max_tokens = static_cast<int>(golden.greedy_tokens.size());
  const Answer answer = RunAll(*engine, {request})[0];
  size_t num_equal = 0;
  while (num_equal < answer.tokens.size() && answer.tokens[num_equal] == golden.greedy_tokens[num_equal]) ++num_equal;
  // A near tie may go the other way, and everything after it with it.
  if (num_equal < golden.greedy_tokens.size()) {
    EXPECT_LT(golden.greedy_margin[num_equal], 1e-3) << "differs at " << num_equal;
  }
  EXPECT_GT(num_equal, 8u);
}

}  // namespace
}  // namespace cachalot
