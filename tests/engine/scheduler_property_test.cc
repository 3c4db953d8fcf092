// Scheduler under random load: arrivals, lengths, priorities, clients, cancels, deadlines, tiny pools, few slots, few
// rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <random>
#include <string>

#include "tests/engine/scheduler_driver.h"

namespace cachalot {
namespace {

struct Totals {
  uint64_t loads = 0, steps = 0, preemptions = 0, recomputed = 0, drafts = 0, accepted = 0;
  uint64_t prompt_tokens = 0, cached = 0, evictions = 0, resets = 0;
  SchedulerDriver::Counts counts;

  void Add(SchedulerDriver& driver) {
    const EngineStats stats = driver.stats();
    steps += stats.steps;
    preemptions += stats.preemptions;
    recomputed += stats.recomputed_tokens;
    drafts += stats.draft_tokens;
    accepted += stats.accepted_draft_tokens;
    prompt_tokens += stats.prompt_tokens;
    cached += stats.cached_prompt_tokens;
    evictions += stats.prefix_cache_evictions;
    const SchedulerDriver::Counts& c = driver.counts();
    counts.shared += c.shared;
    counts.followed += c.followed;
    counts.counted += c.counted;
    counts.cancelled += c.cancelled;
    counts.expired += c.expired;
    counts.overtakes += c.overtakes;
    counts.preferred += c.preferred;
    counts.longest_first_wait = std::max(counts.longest_first_wait, c.longest_first_wait);
    counts.longest_decode_wait = std::max(counts.longest_decode_wait, c.longest_decode_wait);
    counts.longest_prompt_wait = std::max(counts.longest_prompt_wait, c.longest_prompt_wait);
  }
};

// Half of the time arrivals bring about what the steps can carry, a quarter of the time less, or too much.
void RunRandomLoad(uint32_t seed, Totals* totals) {
  std::mt19937 random(seed);
  const auto below = [&random](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  const int max_sequences = 1 + below(8);
  const int num_blocks = 2 + below(below(2) == 0 ? 6 : 30);
  const int max_drafts = below(3) == 0 ? 0 : 1 + below(4);
  const int max_model_len = std::min(num_blocks * kBlockTokens - DraftSlack(max_drafts), 64 + below(400));
  const int max_batch_tokens = 1 + below(below(2) == 0 ? max_sequences : 100);
  const SchedulerLimits limits = {max_batch_tokens, max_sequences, max_model_len, {77}, max_drafts, below(2) == 0};
  const int num_priorities = 1 + below(4), num_clients = 1 + below(4),
            usual_length = 1 + below(below(2) == 0 ? 60 : max_model_len), usual_tokens = 1 + below(80);
  const double rows = 0.5 * (usual_length + usual_tokens) + 0.1 * max_model_len;  // of a request, about
  const double arrivals = std::array{0.5, 1.0, 1.0, 2.0}[below(4)] * std::min(max_batch_tokens, max_sequences) / rows;

  const int num_families = 1 + below(3), num_salts = 1 + below(2);
  const bool has_cache = below(8) > 0, has_families = below(4) > 0;
  SchedulerDriver driver(limits, num_blocks, has_cache ? BlockPool::PrefixCache::kOn : BlockPool::PrefixCache::kOff);
  std::poisson_distribution<int> num_arrivals(arrivals);
  RequestId last = 0;
  for (int turn = 0; turn < 600; ++turn) {
    for (int i = num_arrivals(random); i > 0; --i) {
      SchedulerDriver::Options options;
      const int length = 1 + below(below(5) > 0 ? usual_length : max_model_len - 1);
      options.scores = below(4) == 0;
      options.num_top = below(4) > 0 ? -1 : below(3);
      options.max_tokens = below(below(5) > 0 ? usual_tokens : 300) + (options.scores ? 0 : 1);
      options.priority = below(num_priorities) - (below(8) == 0 ? 1000 : 0);
      options.client = std::string(1, static_cast<char>('a' + below(num_clients)));
      if (below(8) == 0) options.deadline_turns = 1 + below(200);
      options.family = below(num_families);
      options.num_of_family = has_families ? below(2 * max_model_len) : 0;
      options.salt = below(num_salts) == 0 ? "" : "another tenant";
      options.has_penalties = below(3) == 0;
      if (last > 0 && below(4) == 0) options.continues = last - std::min<RequestId>(last - 1, below(20));
      last = driver.Add(std::min(length, max_model_len - 1), options);
    }
    if (last > 0 && below(20) == 0) driver.Cancel(last - std::min<RequestId>(last - 1, below(10)));
    if (below(2000) == 0) {
      driver.pool().ResetPrefixCache();
      ++totals->resets;
    }
    driver.Turn(below(4) == 0);
    if (testing::Test::HasFailure()) return;
  }
  driver.Drain(1000000);
  totals->Add(driver);
  ++totals->loads;
}

// 100,000 steps in all, each held to the invariants of SchedulerDriver and FakeDevice.
TEST(SchedulerProperty, RandomLoad) {
  Totals totals;
  for (uint32_t seed = 0; totals.steps < 100000; ++seed) {
    RunRandomLoad(seed, &totals);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  const SchedulerDriver::Counts& counts = totals.counts;
  std::printf(
      "[ measured ] %llu steps of %llu loads: %llu preemptions (%llu tokens recomputed), %llu cancellations, %llu "
      "expiries, %llu overtakes, %llu of them for what is cached\n",
      static_cast<unsigned long long>(totals.steps), static_cast<unsigned long long>(totals.loads),
      static_cast<unsigned long long>(totals.preemptions), static_cast<unsigned long long>(totals.recomputed),
      static_cast<unsigned long long>(counts.cancelled), static_cast<unsigned long long>(counts.expired),
      static_cast<unsigned long long>(counts.overtakes), static_cast<unsigned long long>(counts.preferred));
  std::printf("[ measured ] longest wait for a row: the first of all %d steps, decoding %d, prompts %d\n",
              counts.longest_first_wait, counts.longest_decode_wait, counts.longest_prompt_wait);
  std::printf("[ measured ] %llu of %llu drafts accepted\n", static_cast<unsigned long long>(totals.accepted),
              static_cast<unsigned long long>(totals.drafts));
  std::printf(
      "[ measured ] %llu of %llu prompt tokens cached, %llu evictions, %llu resets; %llu block uses shared, %llu waits "
      "for what another computes, %llu tokens counted for penalties\n",
      static_cast<unsigned long long>(totals.cached), static_cast<unsigned long long>(totals.prompt_tokens),
      static_cast<unsigned long long>(totals.evictions), static_cast<unsigned long long>(totals.resets),
      static_cast<unsigned long long>(counts.shared), static_cast<unsigned long long>(counts.followed),
      static_cast<unsigned long long>(counts.counted));
  for (uint64_t count :
       {totals.cached, totals.evictions, totals.resets, counts.shared, counts.followed, counts.counted}) {
    EXPECT_GT(count, 0u);
  }
  EXPECT_GT(totals.accepted, 0u);
  EXPECT_GT(totals.drafts, totals.accepted);
  EXPECT_GT(totals.preemptions, 0u);
  EXPECT_GT(totals.recomputed, 0u);
  EXPECT_GT(counts.cancelled, 0u);
  EXPECT_GT(counts.expired, 0u);
  EXPECT_GT(counts.overtakes, 0u);
  EXPECT_GT(counts.preferred, 0u);
}

}  // namespace
}  // namespace cachalot
