// Experts spread over ranks change no bit of any answer: greedy or sampled, with drafts and prefix cache, in any
// company, some ranks idle; and when one rank dies all say so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <ctime>
#include <random>

#include "absl/time/clock.h"
#include "engine/model/config.h"
#include "tests/engine/golden.h"

namespace cachalot {
namespace {

using testing::HasSubstr;

EngineOptions Options(const Golden& golden, int num_ranks, int speculative_tokens = 0) {
  EngineOptions options;
  options.model_dir = golden.model_dir;
  options.device = "cpu";
  options.num_ranks = num_ranks;
  options.max_model_len = 256;
  options.max_sequences = 16;
  options.max_batch_tokens = 48;
  options.speculative_tokens = speculative_tokens;
  return options;
}

std::vector<Request> RandomRequests(const Golden& golden, int count, uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    const std::vector<int32_t>& text = golden.prompts[1 + below(2)].tokens;
    Request& request = requests.emplace_back();
    request.prompt.assign(text.begin(), text.begin() + 1 + below(std::min<int>(static_cast<int>(text.size()), 150)));
    SamplingParams& s = request.sampling;
    s.temperature = below(3) == 0 ? 0.0f : 0.3f + 0.1f * static_cast<float>(below(11));
    if (below(3) == 0) s.top_p = 0.8f;
    if (below(4) == 0) s.repetition_penalty = 1.2f;
    s.seed = random();
    s.max_tokens = 1 + below(30);
    s.ignore_eos = true;
    s.logprobs = below(3) == 0 ? 3 : -1;
    s.prompt_logprobs = below(5) == 0 ? 1 : -1;
  }
  return requests;
}

std::vector<std::vector<uint32_t>> AllBits(const std::vector<Answer>& answers) {
  std::vector<std::vector<uint32_t>> bits;
  for (const Answer& answer : answers) bits.push_back(Bits(answer));
  return bits;
}

class RanksTest : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Family, RanksTest, testing::Values("v3_like", "v3_heads", "v2_lite"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(RanksTest, AnyNumberOfThemGivesTheTokensOfOne) {
  const Golden golden = LoadGolden(GetParam());
  const std::vector<Request> requests = RandomRequests(golden, 40, 11);
  std::vector<std::vector<uint32_t>> expected;
  const int num_experts = ModelConfig::Load(golden.model_dir)->n_routed_experts;
  for (const int num_ranks : {1, 2, 3, 4, 8}) {
    if (num_experts % num_ranks != 0) continue;
    auto engine = MakeEngine(Options(golden, num_ranks));
    const auto bits = AllBits(RunAll(*engine, requests));
    if (num_ranks == 1) expected = bits;
    EXPECT_EQ(bits, expected) << num_ranks << " ranks";
    EXPECT_EQ(AllBits(RunAll(*engine, {requests[0]})), AllBits(RunAll(*engine, {requests[0]})));
    // One request at a time: the others' steps are empty.
    for (int i = 0; i < 4; ++i)
      EXPECT_EQ(Bits(RunAll(*engine, {requests[i]})[0]), expected[i]) << num_ranks << " ranks";
    const std::vector<EngineStats> stats = engine->rank_stats();
    ASSERT_EQ(stats.size(), static_cast<size_t>(num_ranks));
    for (const EngineStats& rank : stats) EXPECT_GT(rank.generated_tokens, 0u);
    EXPECT_GT(engine->stats().cached_prompt_tokens, 0u);
  }
}

TEST(EngineRanks, DraftsOnAnyNumberOfRanksChangeNothing) {
  const Golden golden = LoadGolden("v3_like");
  const std::vector<Request> requests = RandomRequests(golden, 30, 12);
  std::vector<std::vector<uint32_t>> expected;
  {
    auto engine = MakeEngine(Options(golden, 1));
    expected = AllBits(RunAll(*engine, requests));
  }
  for (const int num_ranks : {2, 4}) {
    for (const int num_drafts : {1, 2, 4}) {
      auto engine = MakeEngine(Options(golden, num_ranks, num_drafts));
      EXPECT_EQ(AllBits(RunAll(*engine, requests)), expected) << num_ranks << " ranks, " << num_drafts << " drafts";
      const EngineStats stats = engine->stats();
      EXPECT_GT(stats.accepted_draft_tokens, 0u);
      std::printf("[ measured ] %d ranks, %d drafts: %llu of %llu accepted, %llu prompt tokens cached\n", num_ranks,
                  num_drafts, static_cast<unsigned long long>(stats.accepted_draft_tokens),
                  static_cast<unsigned long long>(stats.draft_tokens),
                  static_cast<unsigned long long>(stats.cached_prompt_tokens));
    }
  }
}

// Whichever copy computes a row.
TEST_P(RanksTest, RedundantExpertsChangeNothing) {
  const Golden golden = LoadGolden(GetParam());
  const std::vector<Request> requests = RandomRequests(golden, 30, 15);
  const int num_experts = ModelConfig::Load(golden.model_dir)->n_routed_experts;
  auto alone = MakeEngine(Options(golden, 1));
  const auto expected = AllBits(RunAll(*alone, requests));
  for (const int num_ranks : {2, 3, 4, 8}) {  // those that do not divide the experts too
    EngineOptions options = Options(golden, num_ranks);
    options.num_redundant_experts = num_ranks - num_experts % num_ranks;
    auto engine = MakeEngine(options);
    EXPECT_EQ(AllBits(RunAll(*engine, requests)), expected) << num_ranks << " ranks";
    EXPECT_EQ(Bits(RunAll(*engine, {requests[0]})[0]), expected[0]);
  }
}

TEST(EngineRanks, DraftsWithRedundantExpertsChangeNothing) {
  const Golden golden = LoadGolden("v3_like");
  const std::vector<Request> requests = RandomRequests(golden, 30, 16);
  auto alone = MakeEngine(Options(golden, 1));
  const auto expected = AllBits(RunAll(*alone, requests));
  for (const int num_redundant : {4, 48}) {  // 48: every rank has every expert
    EngineOptions options = Options(golden, 4, 2);
    options.num_redundant_experts = num_redundant;
    auto engine = MakeEngine(options);
    EXPECT_EQ(AllBits(RunAll(*engine, requests)), expected) << num_redundant;
    EXPECT_GT(engine->stats().accepted_draft_tokens, 0u);
  }
}

TEST(EngineRanks, DraftsThatAdaptNeedNotAgree) {
  const Golden golden = LoadGolden("v3_like");
  const std::vector<Request> requests = RandomRequests(golden, 30, 13);
  auto alone = MakeEngine(Options(golden, 1));
  EngineOptions options = Options(golden, 4, 2);
  options.adapts_drafts = true;
  auto engine = MakeEngine(options);
  EXPECT_EQ(AllBits(RunAll(*engine, requests)), AllBits(RunAll(*alone, requests)));
}

TEST(EngineRanks, SleepAndWakeAsOne) {
  const Golden golden = LoadGolden("v3_like");
  auto engine = MakeEngine(Options(golden, 4));
  const std::vector<Request> requests = RandomRequests(golden, 12, 14);
  for (const Request& request : requests) {
    EXPECT_EQ(RunAll(*engine, {request})[0].finish_reason, FinishReason::kLength);
    absl::SleepFor(absl::Milliseconds(5));  // long enough for all to sleep
  }
  const uint64_t steps = engine->stats().steps;
  const std::clock_t begin = std::clock();  // of all threads
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, 0.05) << "ranks without work are at work";
  EXPECT_EQ(engine->stats().steps, steps);
}

TEST(EngineRanks, StopEndsWhatAllHaveUnderWay) {
  const Golden golden = LoadGolden("v3_like");
  for (int i = 0; i < 5; ++i) {
    auto engine = MakeEngine(Options(golden, 4, i % 2));
    std::atomic<int> num_ended = 0;
    for (int n = 0; n < 8; ++n) {
      Request request;
      request.prompt.assign(5 + n, 42);
      request.sampling.max_tokens = 240;
      request.sampling.ignore_eos = true;
      const auto id = engine->Submit(request, [&num_ended](const Delta& delta) {
        if (delta.finish_reason == FinishReason::kNone) return;
        EXPECT_TRUE(delta.finish_reason == FinishReason::kError || delta.finish_reason == FinishReason::kLength);
        ++num_ended;
      });
      ASSERT_TRUE(id.ok()) << id.status();
      if (n == 3) engine->Cancel(*id + 1);  // unknown
    }
    absl::SleepFor(absl::Milliseconds(10 * i));
    engine.reset();
    EXPECT_EQ(num_ended, 8);
  }
}

TEST(EngineRanks, RefusesWhatDoesNotDivide) {
  const Golden golden = LoadGolden("v3_like");
  EXPECT_THAT(std::string(Engine::Create(Options(golden, 3)).status().message()),
              HasSubstr("ranks: found 3, which do not divide the model's 16 experts, expected one of 1, 2, 4, 8, 16"));
  EXPECT_THAT(std::string(Engine::Create(Options(golden, 0)).status().message()), HasSubstr("ranks: found 0"));
  EngineOptions options = Options(golden, 2);
  options.num_redundant_experts = 3;
  EXPECT_THAT(std::string(Engine::Create(options).status().message()),
              HasSubstr("redundant-experts: found 3, which with the model's 16 experts do not divide among 2 ranks, "
                        "expected 2 or 4"));
  options.num_redundant_experts = -1;
  EXPECT_THAT(std::string(Engine::Create(options).status().message()), HasSubstr("redundant-experts: found -1"));
  options.num_redundant_experts = 0;
  options.kv_cache_bytes = 1 << 12;  // every rank fails, and none waits for another
  EXPECT_THAT(std::string(Engine::Create(options).status().message()), HasSubstr("raise --kv-cache-memory"));
}

}  // namespace
}  // namespace cachalot
