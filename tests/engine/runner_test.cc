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

// Steps as long as any, wherever there is room for the logits of a few rows only; others decode in between, with drafts
// or without.
TEST(RunnerTest, ScoresAPromptInStepsThatAreFull) {
  const Golden golden = LoadGolden("v3_like");
  std::vector<Request> requests = {ScoreRequest(golden.prompts[2].tokens, 3)};  // 150 tokens
  for (int i = 0; i < 3; ++i) {
    requests.push_back(ScoreRequest({5, 6, 7 + i}));
    requests.back().sampling.max_tokens = 20;
    requests.back().sampling.temperature = 0.8f;
  }
  const std::vector<Answer> expected = StepLoop(golden.model_dir, {64, 4, 512, {}}, 32).Run(requests);
  EXPECT_EQ(expected[0].prompt_logprobs.size(), golden.prompts[2].tokens.size() - 1);
  for (int num_drafts : {0, 2}) {
    const SchedulerLimits limits = {64, 4, 512, {}, num_drafts};
    const int num_decoded = limits.max_sequences * (1 + num_drafts);
    StepLoop whole(golden.model_dir, limits, 32), parts(golden.model_dir, limits, 32, num_decoded + 1);
    whole.Run(requests);
    const std::vector<Answer> answers = parts.Run(requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(answers[i].tokens, expected[i].tokens);
      ExpectSame(answers[i].logprobs, expected[i].logprobs);
      ExpectSame(answers[i].prompt_logprobs, expected[i].prompt_logprobs);
    }
    EXPECT_EQ(parts.stats().steps, whole.stats().steps);
    EXPECT_LE(parts.stats().steps, 20u + 3u);
    EXPECT_EQ(parts.stats().draft_tokens > 0, num_drafts > 0);
  }
}

// As many as the block table has entries, which are more than the device has room for at once, in one step.
TEST(RunnerTest, TakesABlockUpdateForEveryEntryOfTheTable) {
  const Golden golden = LoadGolden("v3_like");
  constexpr int kSlots = 64, kBlocksASlot = 300, kNumBlocks = kBlocksASlot;
  StepLoop loop(golden.model_dir, {128, kSlots, kBlocksASlot * kBlockTokens, {}}, kNumBlocks);
  Runner& runner = loop.runner();
  StepPlan plan;
  for (int32_t slot = 0; slot < kSlots; ++slot) {
    for (int32_t i = 0; i < kBlocksASlot; ++i) plan.block_updates.push_back({slot, i, (slot + i) % kNumBlocks});
  }
  const std::vector<int32_t> prompt(golden.prompts[2].tokens.begin(), golden.prompts[2].tokens.begin() + 100);
  SequenceStep step;
  step.num_rows = 100;
  step.start = 0;
  step.tokens = prompt;
  step.params.apply = 1;
  step.params.temperature = 0;
  plan.num_rows = 100;
  plan.logits_rows = {{99, 0, -1}};
  // Those of the first slot come in the first submission, those of the last in the last; both say the same.
  std::vector<StepResult> results;
  for (int32_t slot : {0, kSlots - 1}) {
    step.slot = slot;
    plan.sequences = {step};
    plan.wants_top = slot > 0;
    ++plan.step;
    runner.Launch(plan, {StepShape::Path::kMixed, 1, 100, 1});
    auto result = runner.Wait(absl::InfiniteDuration());
    ASSERT_TRUE(result.ok()) << result.status();
    results.push_back(*std::move(result));
    plan.block_updates.clear();
  }
  EXPECT_EQ(results[0].tokens, results[1].tokens);
  EXPECT_EQ(results[0].logprobs, results[1].logprobs);
  EXPECT_TRUE(results[0].top_tokens.empty() && results[0].top_logprobs.empty()) << "nobody asked";
  ASSERT_EQ(results[1].top_tokens.size(), kMaxTopLogprobs);
  EXPECT_EQ(results[1].top_tokens[0], golden.prompts[2].top1[99]);
  EXPECT_EQ(results[1].top_logprobs.size(), kMaxTopLogprobs);
  ASSERT_GT(golden.prompts[2].top1_margin[99], 0.01f);
  EXPECT_EQ(results[0].tokens[0], golden.prompts[2].top1[99]);
}

}  // namespace
}  // namespace cachalot
