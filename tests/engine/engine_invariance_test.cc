// The same log-probabilities and tokens, bit for bit, however work is batched, chunked or preempted.
#include <gtest/gtest.h>

#include <cstdio>
#include <random>

#include "tests/engine/golden.h"
#include "tests/engine/step_loop.h"

namespace cachalot {
namespace {

EngineOptions Options(const Golden& golden, int max_batch_tokens) {
  EngineOptions options;
  options.model_dir = golden.model_dir;
  options.device = "cpu";
  options.max_model_len = 512;
  options.max_sequences = 65;
  options.max_batch_tokens = max_batch_tokens;
  return options;
}

Request Sampled(std::vector<int32_t> prompt, float temperature, uint64_t seed, int max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.sampling.temperature = temperature;
  request.sampling.seed = seed;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  request.sampling.logprobs = 5;
  request.sampling.prompt_logprobs = 2;
  return request;
}

// The request under test, greedy and sampled, and 63 strangers of all lengths.
std::vector<Request> Crowd(const Golden& golden) {
  const std::vector<int32_t>& prompt = golden.prompts[2].tokens;  // 150 tokens: three blocks
  std::vector<Request> requests = {Sampled(prompt, 0.0f, 0, 20), Sampled(prompt, 0.9f, 1234567890123, 20)};
  std::mt19937 random(7);
  while (requests.size() < 65) {
    std::vector<int32_t> other(1 + random() % 40);
    for (int32_t& token : other) token = static_cast<int32_t>(3 + random() % 100);
    requests.push_back(Sampled(std::move(other), 0.5f * (random() % 3), random(), 1 + random() % 12));
  }
  return requests;
}

class InvarianceTest : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Family, InvarianceTest, testing::Values("v3_like", "v3_heads", "v2_lite", "odd"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(InvarianceTest, AloneOrAmongOthersInAnyChunks) {
  const Golden golden = LoadGolden(GetParam());
  const std::vector<Request> crowd = Crowd(golden);
  std::vector<uint32_t> greedy, sampled;
  {
    auto engine = MakeEngine(Options(golden, 512));  // the whole prompt in one step
    greedy = Bits(RunAll(*engine, {crowd[0]})[0]);
    sampled = Bits(RunAll(*engine, {crowd[1]})[0]);
  }
  ASSERT_NE(greedy, sampled);
  for (int chunk : {1, 7, 64, 512}) {
    auto engine = MakeEngine(Options(golden, chunk));
    EXPECT_EQ(Bits(RunAll(*engine, {crowd[0]})[0]), greedy) << "alone, chunk " << chunk;
    EXPECT_EQ(Bits(RunAll(*engine, {crowd[1]})[0]), sampled) << "alone, chunk " << chunk;
    const std::vector<Answer> answers = RunAll(*engine, crowd);
    EXPECT_EQ(Bits(answers[0]), greedy) << "among 64, chunk " << chunk;
    EXPECT_EQ(Bits(answers[1]), sampled) << "among 64, chunk " << chunk;
    std::printf("[ measured ] chunk %d: %llu steps\n", chunk, static_cast<unsigned long long>(engine->stats().steps));
  }
}

TEST_P(InvarianceTest, PreemptedOrNot) {
  const Golden golden = LoadGolden(GetParam());
  std::vector<Request> requests;
  size_t num_prompt_tokens = 0;
  for (int i = 0; i < 12; ++i) {
    std::vector<int32_t> prompt = golden.prompts[2].tokens;
    prompt.resize(40 + i);
    num_prompt_tokens += prompt.size();
    requests.push_back(Sampled(std::move(prompt), 0.7f, 100 + i, 120));
    if (i % 3 == 0) continue;
    // Shaped in every way; wants to end from the first token on, and does with the one after the 65th, 70th, ...
    SamplingParams& s = requests.back().sampling;
    s.repetition_penalty = 1.2f;
    s.frequency_penalty = 0.3f;
    s.presence_penalty = -0.2f;
    s.min_tokens = 60 + 5 * i;
    s.stop_token_ids = {static_cast<int32_t>(50 + i)};
    s.logit_bias = {{50 + i, 100.0f}, {40, 2.0f}, {41, -3.0f}};
  }
  StepLoop roomy(golden.model_dir, {64, 65, 512, {}}, 12 * 3), tight(golden.model_dir, {64, 65, 192, {}}, 8);
  const std::vector<Answer> expected = roomy.Run(requests), answers = tight.Run(requests);
  EXPECT_EQ(roomy.stats().preemptions, 0u);
  const EngineStats stats = tight.stats();
  std::printf("[ measured ] %llu preemptions\n", static_cast<unsigned long long>(stats.preemptions));
  EXPECT_GT(stats.preemptions, 0u);
  EXPECT_GT(stats.recomputed_tokens, 0u);
  EXPECT_EQ(stats.prompt_tokens, num_prompt_tokens);
  int num_preemptions = 0, num_shaped_preemptions = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(Bits(answers[i]), Bits(expected[i])) << i;
    num_preemptions += answers[i].times.num_preemptions;
    if (i % 3 == 0) continue;
    num_shaped_preemptions += answers[i].times.num_preemptions;
    EXPECT_EQ(answers[i].finish_reason, FinishReason::kStop);
    EXPECT_EQ(answers[i].tokens.size(), 1u + requests[i].sampling.min_tokens);
  }
  EXPECT_EQ(num_preemptions, static_cast<int>(stats.preemptions));
  std::printf("[ measured ] %d of them with penalties, biases and bans; %llu tokens recomputed\n",
              num_shaped_preemptions, static_cast<unsigned long long>(stats.recomputed_tokens));
  EXPECT_GT(num_shaped_preemptions, 0);
}

// Requests of higher priority take the slots of two that decode.
TEST_P(InvarianceTest, PreemptedByPriorityOrNot) {
  const Golden golden = LoadGolden(GetParam());
  std::vector<Request> requests = {Sampled(golden.prompts[1].tokens, 0.7f, 1, 340),
                                   Sampled(golden.prompts[2].tokens, 0.9f, 2, 340)};
  for (Request& request : requests) {
    request.priority = 5;
    request.sampling.frequency_penalty = 0.4f;
    request.sampling.logit_bias = {{42, 1.5f}};
  }
  for (int i = 0; i < 3; ++i) requests.push_back(Sampled(golden.prompts[2].tokens, 0.8f, 10 + i, 20));
  StepLoop roomy(golden.model_dir, {64, 65, 512, {}}, 64), tight(golden.model_dir, {64, 2, 512, {}}, 64);
  const std::vector<Answer> expected = roomy.Run(requests);
  for (int i = 0; i < 2; ++i) tight.Add(requests[i]);
  while (tight.answers()[0].tokens.empty() || tight.answers()[1].tokens.empty()) ASSERT_TRUE(tight.Turn());
  for (size_t i = 2; i < requests.size(); ++i) tight.Add(requests[i]);
  while (tight.Turn()) continue;
  const std::vector<Answer>& answers = tight.answers();
  std::printf("[ measured ] %llu preemptions, %llu tokens recomputed\n",
              static_cast<unsigned long long>(tight.stats().preemptions),
              static_cast<unsigned long long>(tight.stats().recomputed_tokens));
  EXPECT_GE(tight.stats().preemptions, 2u);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(Bits(answers[i]), Bits(expected[i])) << i;
    EXPECT_EQ(answers[i].tokens.size(), static_cast<size_t>(requests[i].sampling.max_tokens));
    EXPECT_TRUE(i < 2 || answers[i].times.num_preemptions == 0);
  }
}

}  // namespace
}  // namespace cachalot
