// The same log-probabilities and tokens, bit for bit, however work is batched, chunked or preempted.
#include <gtest/gtest.h>

#include <bit>
#include <cstdio>
#include <random>

#include "tests/engine/golden.h"

namespace cachalot {
namespace {

// Every token id and every log-probability's bits, in order.
std::vector<uint32_t> Bits(const Answer& answer) {
  std::vector<uint32_t> bits;
  const auto add = [&bits](const TokenLogprob& l) {
    bits.push_back(l.token);
    bits.push_back(std::bit_cast<uint32_t>(l.logprob));
    for (const auto& [token, logprob] : l.top) {
      bits.push_back(token);
      bits.push_back(std::bit_cast<uint32_t>(logprob));
    }
  };
  for (int32_t token : answer.tokens) bits.push_back(token);
  for (const TokenLogprob& l : answer.logprobs) add(l);
  for (const TokenLogprob& l : answer.prompt_logprobs) add(l);
  return bits;
}

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
  for (int i = 0; i < 6; ++i) requests.push_back(Sampled(golden.prompts[1].tokens, 0.7f, 100 + i, 100));
  auto roomy = MakeEngine(Options(golden, 64));
  const std::vector<Answer> expected = RunAll(*roomy, requests);
  EXPECT_EQ(roomy->stats().preemptions, 0u);

  EngineOptions options = Options(golden, 64);
  options.max_model_len = 192;  // three blocks: what one sequence ends up with; six want eighteen
  options.kv_cache_bytes = roomy->model().kv_bytes_per_token * 64 * 9;
  auto tight = MakeEngine(options);
  const std::vector<Answer> answers = RunAll(*tight, requests);
  const EngineStats stats = tight->stats();
  std::printf("[ measured ] %llu preemptions\n", static_cast<unsigned long long>(stats.preemptions));
  EXPECT_GT(stats.preemptions, 0u);
  EXPECT_EQ(stats.blocks_used, 0);
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(Bits(answers[i]), Bits(expected[i])) << i;
}

}  // namespace
}  // namespace cachalot
