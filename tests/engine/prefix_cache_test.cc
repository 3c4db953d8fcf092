// The prefix cache changes no bit of any answer; what it spares, and for whom.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "tests/engine/golden.h"
#include "tests/engine/scheduler_driver.h"
#include "tests/engine/step_loop.h"

namespace cachalot {
namespace {

using Driver = SchedulerDriver;

SchedulerLimits Limits(int max_drafts = 0) { return {256, 8, 512, {1}, max_drafts}; }

// The same prompts at once: one computes, the others wait for its blocks; the last token is always fed.
TEST(Scheduler, PromptsThatBeginTheSameAreComputedOnce) {
  Driver driver(Limits(), 64);
  std::vector<RequestId> ids;
  for (int i = 0; i < 4; ++i) ids.push_back(driver.Add(384, {.max_tokens = 3, .family = 1, .num_of_family = 384}));
  driver.Drain(100);
  const EngineStats stats = driver.stats();
  EXPECT_EQ(stats.cached_prompt_tokens, 3u * 320);
  EXPECT_EQ(stats.prompt_tokens, 4u * 384);
  EXPECT_EQ(stats.prefix_cache_queries, 4u * 384);
  EXPECT_EQ(driver.record(ids[0]).num_cached_tokens, 0);
  EXPECT_EQ(driver.record(ids[3]).num_cached_tokens, 320);
  const RequestId warm = driver.Add(385, {.max_tokens = 3, .family = 1, .num_of_family = 384});
  driver.Turn();
  EXPECT_EQ(driver.last_plan().num_rows, 1);
  driver.Drain(100);
  EXPECT_EQ(driver.record(warm).num_cached_tokens, 384);
}

// Who waits for blocks is admitted as soon as those that it would share leave room for the others, and not later:
// blocks that somebody computes, or takes from among the idle ones.
TEST(Scheduler, WhoWaitsForBlocksIsAdmittedAsSoonAsItSharesEnough) {
  Driver computed({64, 4, 512, {1}}, 10);
  computed.Add(384, {.max_tokens = 3, .family = 1, .num_of_family = 384});  // six blocks, one a step
  const RequestId waiting = computed.Add(384, {.max_tokens = 3, .family = 1, .num_of_family = 384});
  for (int i = 0; i < 4; ++i) {
    EXPECT_LT(computed.record(waiting).live->slot, 0) << i << " of three that it must share";
    computed.Turn();
  }
  EXPECT_GE(computed.record(waiting).live->slot, 0);
  computed.Drain(100);

  Driver taken({384, 4, 512, {1}}, 10);
  taken.Add(320, {.max_tokens = 1, .family = 1, .num_of_family = 320});
  taken.Drain(100);
  const RequestId other = taken.Add(65, {.max_tokens = 20});
  taken.Turn();
  // Eight blocks and one to spare are more than there are. Whoever raises itself shares the idle five.
  const RequestId large = taken.Add(511, {.max_tokens = 1, .family = 1, .num_of_family = 320});
  taken.Turn();
  const RequestId raised = taken.Add(321, {.max_tokens = 60, .priority = -1, .family = 1, .num_of_family = 320});
  while (taken.record(other).reason == FinishReason::kNone) {
    EXPECT_LT(taken.record(large).live->slot, 0);
    ASSERT_TRUE(taken.Turn());
  }
  taken.Turn();
  EXPECT_GE(taken.record(large).live->slot, 0);
  EXPECT_TRUE(taken.record(raised).live->is_decoding);
  taken.Drain(100);
  EXPECT_EQ(taken.record(large).num_cached_tokens, 320);
}

// ---- The longest cached prefix first

absl::Time StartOf(Driver& driver, RequestId id) {
  return driver.record(id).submitted + driver.record(id).times.queued;
}

std::vector<RequestId> ByStart(Driver& driver, std::vector<RequestId> ids) {
  std::sort(ids.begin(), ids.end(),
            [&driver](RequestId a, RequestId b) { return StartOf(driver, a) < StartOf(driver, b); });
  return ids;
}

// A prompt of which the first blocks are family 1's, and are cached.
Driver::Options Cached(int num_blocks, std::string client = "") {
  return {.max_tokens = 2, .client = std::move(client), .family = 1, .num_of_family = num_blocks * kBlockTokens};
}

// Every other turn is that of the first, so that nobody starves.
TEST(Scheduler, EveryOtherTurnIsThatOfTheLongestCachedPrefix) {
  Driver driver({512, 1, 512, {1}}, 32);
  driver.Add(400, Cached(6));
  driver.Drain(100);
  driver.Add(10, {.max_tokens = 10});
  driver.Turn();
  const RequestId first = driver.Add(400, {.max_tokens = 2}), second = driver.Add(400, {.max_tokens = 2});
  const RequestId two = driver.Add(400, Cached(2)), six = driver.Add(400, Cached(6)), five = driver.Add(400, Cached(5));
  const RequestId last = driver.Add(400, Cached(6));
  driver.Drain(1000);
  EXPECT_THAT(ByStart(driver, {first, second, two, five, six, last}),
              testing::ElementsAre(first, six, second, last, two, five));
  EXPECT_EQ(driver.record(five).num_cached_tokens, 5 * kBlockTokens);
}

// Whoever asks for what is cached, again and again, holds nobody up for longer than those in front of it take.
TEST(Scheduler, WhatIsNotCachedDoesNotStarve) {
  Driver driver({512, 1, 512, {1}}, 32);
  driver.Add(400, Cached(6));
  driver.Drain(100);
  RequestId plain = 0;
  for (int i = 0; i < 8; ++i) plain = driver.Add(400, {.max_tokens = 2});
  std::vector<RequestId> cached;
  while (driver.record(plain).reason == FinishReason::kNone) {
    cached.push_back(driver.Add(400, Cached(6)));
    driver.Turn();
    ASSERT_LT(cached.size(), 200u);
  }
  driver.Drain(10000);
  const auto has_passed = [&](RequestId id) { return StartOf(driver, id) < StartOf(driver, plain); };
  EXPECT_EQ(std::count_if(cached.begin(), cached.end(), has_passed), 8) << "one for each of the others, and its own";
}

// What is cached is no reason to pass a client that has nothing running, or a better priority.
TEST(Scheduler, WhatIsCachedPassesNeitherAnotherClientsTurnNorPriority) {
  Driver driver({512, 2, 512, {1}}, 64);
  driver.Add(400, Cached(6));
  driver.Drain(100);
  driver.Add(10, {.max_tokens = 300, .client = "many"});
  driver.Add(10, {.max_tokens = 10, .client = "many"});
  driver.Turn();
  std::vector<RequestId> many;
  for (int i = 0; i < 4; ++i) many.push_back(driver.Add(400, Cached(6, "many")));
  Driver::Options low = Cached(6, "low");
  low.priority = 1;
  const RequestId lower = driver.Add(400, low), other = driver.Add(400, {.max_tokens = 2, .client = "other"});
  driver.Drain(1000);
  EXPECT_THAT(ByStart(driver, {many[0], many[1], lower, other}), testing::ElementsAre(other, many[0], many[1], lower));
}

// Who has been chosen, and waits for blocks, may be cancelled.
TEST(Scheduler, AnotherIsChosenWhereOneIsCancelled) {
  Driver driver({512, 4, 512, {1}}, 16);
  driver.Add(400, Cached(6));
  driver.Drain(100);
  driver.Add(400, {.max_tokens = 60});
  driver.Add(10, {.max_tokens = 60});
  driver.Turn();
  const RequestId first = driver.Add(500, {.max_tokens = 2}), cached = driver.Add(500, Cached(3));
  const RequestId more = driver.Add(500, Cached(6));
  driver.Turn();
  for (RequestId id : {more, cached}) {
    EXPECT_LT(driver.record(id).live->slot, 0);
    driver.Cancel(id);
    driver.Turn();
  }
  driver.Drain(1000);
  EXPECT_EQ(driver.record(first).reason, FinishReason::kLength);
}

// ---- Giving way: what is shared need not be given

// The first runs and holds what another's prompt begins with. For the rest one of lower priority gives way, and not
// two; of eight blocks one alone makes room.
TEST(Scheduler, NobodyGivesWayForWhatIsShared) {
  for (const int num_blocks : {12, 8}) {
    Driver driver({512, 8, 512, {1}}, num_blocks);
    driver.Add(300, {.max_tokens = 20, .family = 1, .num_of_family = 300});                       // five blocks
    for (int n = num_blocks / 4; n > 1; --n) driver.Add(100, {.max_tokens = 20, .priority = 1});  // two each
    for (int i = 0; i < 3; ++i) driver.Turn();
    const RequestId shares = driver.Add(319, {.max_tokens = 1, .family = 1, .num_of_family = 300});
    for (int i = 0; i < 5; ++i) driver.Turn();
    EXPECT_EQ(driver.stats().preemptions, 1u) << num_blocks;
    EXPECT_EQ(driver.record(shares).reason, FinishReason::kLength);
    EXPECT_EQ(driver.record(shares).num_cached_tokens, 256);
    driver.Drain(1000);
  }
}

// What only those hold that give way is no gain: it is shared already.
TEST(Scheduler, NobodyGivesWayInVainForWhatTheySharedAlone) {
  Driver driver({512, 8, 512, {1}}, 12);
  driver.Add(300, {.max_tokens = 60});                                                    // five blocks of twelve
  driver.Add(255, {.max_tokens = 60, .priority = 1, .family = 1, .num_of_family = 255});  // four
  for (int i = 0; i < 3; ++i) driver.Turn();
  driver.Add(500, {.max_tokens = 1, .family = 1, .num_of_family = 255});  // eight, of which three are shared
  for (int i = 0; i < 20; ++i) driver.Turn();
  EXPECT_EQ(driver.stats().preemptions, 0u);
  EXPECT_EQ(driver.stats().waiting_for_blocks, 1);
  driver.Drain(1000);
}

// What two share is free once both give way.
TEST(Scheduler, ThoseThatShareGiveWayTogether) {
  Driver driver({512, 8, 512, {1}}, 10);
  const RequestId first = driver.Add(200, {.max_tokens = 50, .priority = 1, .family = 1, .num_of_family = 200});
  const RequestId second = driver.Add(200, {.max_tokens = 50, .priority = 1, .family = 1, .num_of_family = 200});
  for (int i = 0; i < 5; ++i) driver.Turn();
  EXPECT_EQ(driver.pool().num_used(), 5) << "three of them shared";
  const RequestId large = driver.Add(500, {.max_tokens = 1});  // eight, and one for each that runs
  for (int i = 0; i < 4; ++i) driver.Turn();
  EXPECT_EQ(driver.record(large).reason, FinishReason::kLength);
  EXPECT_EQ(driver.record(first).live->num_preemptions, 1);
  EXPECT_EQ(driver.record(second).live->num_preemptions, 1);
  driver.Drain(1000);
}

// Not the rows that its prompt log-probabilities need; but what it fills is for others.
TEST(Scheduler, ScoringAPromptTakesNothingFromTheCache) {
  Driver driver(Limits(), 64);
  driver.Add(200, {.max_tokens = 1, .family = 1, .num_of_family = 200});
  driver.Drain(100);
  const RequestId scored = driver.Add(260, {.max_tokens = 1, .scores = true, .family = 1, .num_of_family = 260});
  driver.Drain(100);
  EXPECT_EQ(driver.record(scored).num_scored, 259);
  EXPECT_EQ(driver.record(scored).num_cached_tokens, 0);
  const RequestId after = driver.Add(260, {.max_tokens = 1, .family = 1, .num_of_family = 260});
  driver.Drain(100);
  EXPECT_EQ(driver.record(after).num_cached_tokens, 256);
}

// An answer's blocks too: the next turn of a conversation finds them.
TEST(Scheduler, GeneratedTokensAreCached) {
  for (int max_drafts : {0, 3}) {
    Driver driver(Limits(max_drafts), 64);
    const RequestId first = driver.Add(100, {.max_tokens = 150});
    driver.Drain(500);
    const RequestId next = driver.Add(20, {.max_tokens = 5, .continues = first});
    driver.Drain(500);
    EXPECT_EQ(driver.record(next).prompt.size(), 270u);
    EXPECT_EQ(driver.record(next).num_cached_tokens, 192);
  }
}

// ---- The whole engine ----

constexpr int kNumRequests = 66, kMaxModelLen = 512;

// A third greedy. Prompts begin as one of three texts does, for a while, and go on in their own way.
std::vector<Request> RandomRequests(const Golden& golden) {
  std::mt19937 random(5);
  const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  std::vector<Request> requests;
  for (int i = 0; i < kNumRequests; ++i) {
    Request& request = requests.emplace_back();
    const std::vector<int32_t>& text = golden.prompts[2].tokens;  // 150 tokens
    const int length = 1 + below(below(4) == 0 ? 60 : 280), num_same = below(2 * length);
    const int family = below(3);
    for (int p = 0; p < length; ++p) {
      request.prompt.push_back(p < num_same ? text[(p * (1 + family) + family) % text.size()] : 3 + below(100));
    }
    if (below(6) == 0) request.cache_salt = "another tenant";
    SamplingParams& s = request.sampling;
    s.temperature = i % 2 == 0 ? 0.0f : 0.3f + 0.1f * static_cast<float>(below(11));
    if (below(3) == 0) s.top_p = 0.5f + 0.1f * static_cast<float>(below(5));
    if (below(4) == 0) s.min_p = 0.02f * static_cast<float>(below(10));
    if (below(2) == 0) {
      s.repetition_penalty = 1.0f + 0.1f * static_cast<float>(below(5));
      s.frequency_penalty = 0.2f * static_cast<float>(below(5));
      s.presence_penalty = -0.2f * static_cast<float>(below(5));
    }
    if (below(4) == 0) s.logit_bias = {{3 + below(60), 2.0f}, {static_cast<int32_t>(70 + below(20)), -2.0f}};
    s.seed = random();
    s.max_tokens = 1 + below(below(4) == 0 ? 200 : 60);
    s.ignore_eos = true;
    s.logprobs = below(4) - 1;
    s.prompt_logprobs = below(10) == 0 ? 1 : -1;
  }
  return requests;
}

// Each with its answer and a few words more: the next turn of a conversation.
std::vector<Request> NextTurns(std::vector<Request> requests, const std::vector<Answer>& answers) {
  for (size_t i = 0; i < requests.size(); ++i) {
    std::vector<int32_t>& prompt = requests[i].prompt;
    prompt.insert(prompt.end(), answers[i].tokens.begin(), answers[i].tokens.end());
    for (int n = static_cast<int>(i) % 5; n > 0; --n) prompt.push_back(static_cast<int32_t>(10 + i % 90));
    ++requests[i].sampling.seed;
  }
  return requests;
}

struct Tally {
  uint64_t greedy = 0, sampled = 0, hits = 0, accepted = 0, preemptions = 0, evictions = 0, with_penalties = 0;
};

class PrefixCacheTest : public testing::TestWithParam<const char*> {
 protected:
  PrefixCacheTest() : golden_(LoadGolden(GetParam())), first_(RandomRequests(golden_)) {
    StepLoop plain(golden_.model_dir, {512, 1, kMaxModelLen, {}}, 8, 0, BlockPool::PrefixCache::kOff);
    const std::vector<Answer> answers = plain.Run(first_);
    requests_ = NextTurns(first_, answers);
    requests_.insert(requests_.begin(), first_.begin(), first_.end());
    plain.Run({requests_.begin() + kNumRequests, requests_.end()});
    for (const Answer& answer : plain.answers()) expected_.push_back(Bits(answer));
    EXPECT_EQ(plain.stats().cached_prompt_tokens, 0u);
    EXPECT_EQ(plain.stats().prefix_cache_queries, 0u);
  }

  // First turns and next turns, cold; then all again, warm.
  void Check(const SchedulerLimits& limits, int num_blocks, const char* what, Tally* tally) {
    StepLoop loop(golden_.model_dir, limits, num_blocks);
    loop.Run({requests_.begin(), requests_.begin() + kNumRequests});
    const EngineStats cold = loop.stats();
    loop.Run({requests_.begin() + kNumRequests, requests_.end()});
    const EngineStats next = loop.stats();
    const std::vector<Answer> answers = loop.Run(requests_);
    const EngineStats stats = loop.stats();
    for (size_t i = 0; i < answers.size(); ++i) {
      const Request& request = requests_[i % requests_.size()];
      EXPECT_EQ(Bits(answers[i]), expected_[i % requests_.size()]) << what << ", request " << i;
      const int num_cached = answers[i].num_cached_tokens;
      EXPECT_LT(num_cached, static_cast<int>(request.prompt.size()));
      EXPECT_TRUE(request.sampling.prompt_logprobs < 0 || num_cached == 0);
      ++(request.sampling.temperature == 0 ? tally->greedy : tally->sampled);
      const SamplingParams& s = request.sampling;
      const bool has_penalties = s.repetition_penalty != 1 || s.frequency_penalty != 0 || s.presence_penalty != 0;
      tally->with_penalties += has_penalties && num_cached > 0 ? 1 : 0;
    }
    std::printf(
        "[ measured ] k = %d, %s: hits %llu of %llu tokens cold, %llu of %llu in next turns, %llu of %llu warm; %llu "
        "drafts accepted, %llu preemptions, %llu evictions\n",
        limits.max_drafts, what, static_cast<unsigned long long>(cold.cached_prompt_tokens),
        static_cast<unsigned long long>(cold.prompt_tokens),
        static_cast<unsigned long long>(next.cached_prompt_tokens - cold.cached_prompt_tokens),
        static_cast<unsigned long long>(next.prompt_tokens - cold.prompt_tokens),
        static_cast<unsigned long long>(stats.cached_prompt_tokens - next.cached_prompt_tokens),
        static_cast<unsigned long long>(stats.prompt_tokens - next.prompt_tokens),
        static_cast<unsigned long long>(stats.accepted_draft_tokens),
        static_cast<unsigned long long>(stats.preemptions),
        static_cast<unsigned long long>(stats.prefix_cache_evictions));
    EXPECT_GT(cold.cached_prompt_tokens, 0u);
    EXPECT_GT(next.cached_prompt_tokens, cold.cached_prompt_tokens);
    EXPECT_GT(stats.cached_prompt_tokens, next.cached_prompt_tokens);
    EXPECT_EQ(limits.max_drafts > 0, stats.accepted_draft_tokens > 0);
    tally->hits += stats.cached_prompt_tokens;
    tally->accepted += stats.accepted_draft_tokens;
    tally->preemptions += stats.preemptions;
    tally->evictions += stats.prefix_cache_evictions;
  }

  const Golden golden_;
  const std::vector<Request> first_;
  std::vector<Request> requests_;  // first turns, then next turns
  std::vector<std::vector<uint32_t>> expected_;
};
INSTANTIATE_TEST_SUITE_P(Family, PrefixCacheTest, testing::Values("v31"),
                         [](const auto& info) { return std::string(info.param); });

// What the MTP layer finds in a cached block is what it would have made: not a draft more or less is right. (Wrong ones
// would change no token, and be seen here only.)
TEST_P(PrefixCacheTest, DraftsAreThoseOfUncachedPrompts) {
  for (int k : {1, 3}) {
    uint64_t accepted[2] = {}, cached[2] = {};
    for (const auto prefix_cache : {BlockPool::PrefixCache::kOff, BlockPool::PrefixCache::kOn}) {
      StepLoop loop(golden_.model_dir, {512, 1, kMaxModelLen, {}, k}, 1024, 0, prefix_cache);
      loop.Run(requests_);
      loop.Run(requests_);
      const int i = prefix_cache == BlockPool::PrefixCache::kOn ? 1 : 0;
      accepted[i] = loop.stats().accepted_draft_tokens;
      cached[i] = loop.stats().cached_prompt_tokens;
    }
    std::printf("[ measured ] k = %d: %llu drafts accepted, with %llu tokens cached %llu\n", k,
                static_cast<unsigned long long>(accepted[0]), static_cast<unsigned long long>(cached[1]),
                static_cast<unsigned long long>(accepted[1]));
    EXPECT_EQ(accepted[0], accepted[1]);
    EXPECT_EQ(cached[0], 0u);
    EXPECT_GT(cached[1], 0u);
  }
}

TEST_P(PrefixCacheTest, ChangesNothing) {
  Tally tally;
  for (int k : {0, 1, 2, 4}) {
    Check({512, 32, kMaxModelLen, {}, k}, 1024, "all at once", &tally);
    Check({512, 1, kMaxModelLen, {}, k}, 1024, "one by one", &tally);
    Check({31, 6, kMaxModelLen, {}, k}, 400, "in small chunks", &tally);
    Check({192, 12, kMaxModelLen, {}, k}, 14, "in a small cache", &tally);
  }
  std::printf(
      "[ measured ] %llu greedy and %llu sampled answers the same bit for bit; %llu tokens hit, %llu drafts accepted, "
      "%llu preemptions, %llu evictions, %llu hits with penalties\n",
      static_cast<unsigned long long>(tally.greedy), static_cast<unsigned long long>(tally.sampled),
      static_cast<unsigned long long>(tally.hits), static_cast<unsigned long long>(tally.accepted),
      static_cast<unsigned long long>(tally.preemptions), static_cast<unsigned long long>(tally.evictions),
      static_cast<unsigned long long>(tally.with_penalties));
  EXPECT_GE(tally.greedy, 2000u);
  EXPECT_GE(tally.sampled, 2000u);
  for (uint64_t count : {tally.preemptions, tally.evictions, tally.with_penalties}) EXPECT_GT(count, 0u);
}

}  // namespace
}  // namespace cachalot
