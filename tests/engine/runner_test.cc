// Runner: what a step brings to the device and takes from it, however much that is.
#include "engine/model/runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "tests/engine/step_loop.h"

namespace cachalot {
namespace {

// Scores and draws that are the same bit for bit.
void ExpectSame(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].token, b[i].token);
    EXPECT_EQ(a[i].logprob, b[i].logprob);
    EXPECT_EQ(a[i].top, b[i].top);
  }
}

// Steps as long as any, wherever there is room for the logits of a few rows only; others decode in between.
TEST(RunnerTest, ScoresAPromptInStepsThatAreFull) {
  const Golden golden = LoadGolden("v3_like");
  std::vector<Request> requests = {ScoreRequest(golden.prompts[2].tokens, 3)};  // 150 tokens
  for (int i = 0; i < 3; ++i) {
    requests.push_back(ScoreRequest({5, 6, 7 + i}));
    requests.back().sampling.max_tokens = 20;
    requests.back().sampling.temperature = 0.8f;
  }
  const SchedulerLimits limits = {64, 4, 512, {}};
  StepLoop whole(golden.model_dir, limits, 32), parts(golden.model_dir, limits, 32, /*max_logits_rows=*/5);
  const std::vector<Answer> expected = whole.Run(requests), answers = parts.Run(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(answers[i].tokens, expected[i].tokens);
    ExpectSame(answers[i].logprobs, expected[i].logprobs);
    ExpectSame(answers[i].prompt_logprobs, expected[i].prompt_logprobs);
  }
  EXPECT_EQ(answers[0].prompt_logprobs.size(), golden.prompts[2].tokens.size() - 1);
  EXPECT_EQ(parts.stats().steps, whole.stats().steps);
  EXPECT_LE(parts.stats().steps, 20u + 3u);
}

}  // namespace
}  // namespace cachalot
