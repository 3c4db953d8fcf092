// Scheduler and block pool against invariants, with results made up by the test instead of a model.
#include "engine/schedule/scheduler.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace cachalot {
namespace {

constexpr int kVocab = 1000;

// Stands where the device stands: keeps per-slot state, checks every plan, makes deterministic tokens.
class FakeDevice {
 public:
  explicit FakeDevice(int num_slots) : slots_(num_slots) {}

  // The token that follows `tokens`: a function of what is in the cache, like a model's.
  static int32_t Next(const std::vector<int32_t>& tokens) {
    uint64_t hash = 1469598103934665603u;
    for (int32_t t : tokens) hash = (hash ^ static_cast<uint64_t>(t)) * 1099511628211u;
    return static_cast<int32_t>(3 + hash % (kVocab - 3));
  }

  StepResult Run(const StepPlan& plan) {
    StepResult result;
    result.step = plan.step;
    for (const BlockUpdate& u : plan.block_updates) {
      auto& table = slots_[u.slot].blocks;
      if (static_cast<int>(table.size()) <= u.index) table.resize(u.index + 1, -1);
      table[u.index] = u.block;
    }
    std::vector<std::vector<int32_t>> after;  // cache contents after each row
    for (const SequenceStep& s : plan.sequences) {
      Slot& slot = slots_[s.slot];
      if (s.params.apply) slot.tokens.clear();
      for (int i = 0; i < s.num_rows; ++i) {
        EXPECT_TRUE(s.start < 0 || static_cast<int>(slot.tokens.size()) == s.start + i) << "rows out of order";
        slot.tokens.push_back(s.start >= 0 ? s.tokens[i] : slot.last);
        const int block = static_cast<int>(slot.tokens.size() - 1) / kBlockTokens;
        EXPECT_LT(block, static_cast<int>(slot.blocks.size())) << "no block for the position";
        after.push_back(slot.tokens);
      }
    }
    result.num_accepted.assign(plan.sequences.size(), 0);
    for (const LogitsRow& row : plan.logits_rows) {
      const int32_t token = row.target >= 0 ? row.target : Next(after[row.row]);
      result.tokens.push_back(token);
      result.logprobs.push_back(-1.0f);
      if (row.target >= 0) continue;
      slots_[plan.sequences[row.sequence].slot].last = token;
      result.num_accepted[row.sequence] = 1;
    }
    result.top_tokens.assign(result.tokens.size() * kMaxTopLogprobs, 0);
    result.top_logprobs.assign(result.tokens.size() * kMaxTopLogprobs, 0);
    return result;
  }

 private:
  struct Slot {
    std::vector<int32_t> tokens, blocks;
    int32_t last = -1;
  };
  std::vector<Slot> slots_;
};

struct Expected {
  std::vector<int32_t> prompt, tokens;
  int max_tokens = 0, num_scored = 0;
  bool scores = false, is_cancelled = false, is_ended = false;
};

class Driver {
 public:
  Driver(SchedulerLimits limits, int num_blocks)
      : limits_(limits), pool_(num_blocks), scheduler_(limits, &pool_), device_(limits.max_sequences) {}

  RequestId Add(std::vector<int32_t> prompt, int max_tokens, bool scores = false, int priority = 0) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = next_id_++;
    sequence->priority = priority;
    sequence->num_prompt_tokens = static_cast<int>(prompt.size());
    sequence->tokens = prompt;
    sequence->sampling.max_tokens = max_tokens;
    if (scores) sequence->sampling.prompt_logprobs = 0;
    expected_[sequence->id] = {prompt, {}, max_tokens, 0, scores, false, false};
    const RequestId id = sequence->id;
    scheduler_.Add(std::move(sequence));
    return id;
  }

  void Cancel(RequestId id) {
    if (!expected_[id].is_ended) expected_[id].is_cancelled = true;
    Scheduler::Deltas deltas;
    scheduler_.Cancel(id, &deltas);
    Take(deltas);
  }

  // One turn of the engine's loop; false when there was nothing to do.
  bool Turn() {
    const StepPlan plan = scheduler_.Plan();
    if (!plan.empty()) {
      CheckPlan(plan);
      results_.push_back(device_.Run(plan));
    }
    if (results_.size() < kMaxStepsInFlight && !plan.empty()) return true;
    if (results_.empty()) return false;
    Scheduler::Deltas deltas;
    scheduler_.Commit(results_.front(), &deltas);
    results_.pop_front();
    Take(deltas);
    return true;
  }

  void Drain(int max_turns) {
    while (Turn()) ASSERT_GT(max_turns--, 0) << "no end in sight: livelock";
    for (const auto& [id, e] : expected_) EXPECT_TRUE(e.is_ended) << "request " << id << " starved";
    EXPECT_EQ(pool_.num_used(), 0) << "leaked blocks";
    EXPECT_EQ(scheduler_.num_running() + scheduler_.num_waiting(), 0);
  }

  Scheduler& scheduler() { return scheduler_; }
  BlockPool& pool() { return pool_; }
  const Expected& expected(RequestId id) { return expected_[id]; }

 private:
  void CheckPlan(const StepPlan& plan) {
    EXPECT_LE(plan.num_rows, limits_.max_batch_tokens);
    EXPECT_LE(static_cast<int>(plan.logits_rows.size()), limits_.max_logits_rows);
    std::set<int> slots;
    int rows = 0;
    for (const SequenceStep& s : plan.sequences) {
      EXPECT_TRUE(slots.insert(s.slot).second) << "slot twice in one step";
      EXPECT_GT(s.num_rows, 0);
      rows += s.num_rows;
    }
    EXPECT_EQ(rows, plan.num_rows);
  }

  void Take(const Scheduler::Deltas& deltas) {
    for (const auto& [id, delta] : deltas) {
      Expected& e = expected_[id];
      EXPECT_FALSE(e.is_ended) << "news of request " << id << " after its end";
      for (const TokenLogprob& l : delta.prompt_logprobs) EXPECT_EQ(l.token, e.prompt[++e.num_scored]);
      for (int32_t token : delta.tokens) {
        std::vector<int32_t> context = e.prompt;
        context.insert(context.end(), e.tokens.begin(), e.tokens.end());
        EXPECT_EQ(token, FakeDevice::Next(context)) << "request " << id;
        e.tokens.push_back(token);
      }
      if (delta.finish_reason == FinishReason::kNone) continue;
      e.is_ended = true;
      if (delta.finish_reason == FinishReason::kCancelled) {
        EXPECT_TRUE(e.is_cancelled);
        continue;
      }
      EXPECT_TRUE(!e.scores || e.num_scored + 1 == static_cast<int>(e.prompt.size()));
      const int room = limits_.max_model_len - static_cast<int>(e.prompt.size());
      if (delta.finish_reason == FinishReason::kLength) {
        EXPECT_EQ(static_cast<int>(e.tokens.size()), std::min(e.max_tokens, room));
      } else {
        EXPECT_EQ(delta.finish_reason, FinishReason::kStop);
        EXPECT_EQ(delta.stop_token, limits_.eos_token_ids[0]);
      }
    }
  }

  const SchedulerLimits limits_;
  BlockPool pool_;
  Scheduler scheduler_;
  FakeDevice device_;
  std::deque<StepResult> results_;
  std::map<RequestId, Expected> expected_;
  RequestId next_id_ = 1;
};

std::vector<int32_t> Prompt(int length, int seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> prompt(length);
  for (int32_t& t : prompt) t = static_cast<int32_t>(3 + random() % (kVocab - 3));
  return prompt;
}

TEST(Scheduler, ChunksAPromptAndKeepsTwoStepsInFlight) {
  Driver driver({64, 4, 8, 512, {1}}, 32);
  driver.Add(Prompt(150, 1), 5);
  StepPlan plan = driver.scheduler().Plan();
  EXPECT_EQ(plan.num_rows, 64);
  EXPECT_EQ(plan.sequences[0].params.apply, 1);
  EXPECT_TRUE(plan.logits_rows.empty());
  EXPECT_EQ(plan.block_updates.size(), 3u) << "the whole prompt's blocks are taken at its start";
  plan = driver.scheduler().Plan();
  EXPECT_EQ(plan.sequences[0].start, 64);
  EXPECT_EQ(plan.sequences[0].params.apply, 0);
  EXPECT_EQ(driver.scheduler().num_in_flight(), 2);
}

TEST(Scheduler, DecodesWithoutKnowingTheTokenYet) {
  Driver driver({64, 4, 8, 512, {1}}, 32);
  driver.Add(Prompt(10, 1), 3);
  StepPlan plan = driver.scheduler().Plan();
  EXPECT_EQ(plan.logits_rows.size(), 1u);
  plan = driver.scheduler().Plan();
  ASSERT_EQ(plan.sequences.size(), 1u);
  EXPECT_EQ(plan.sequences[0].start, -1);
}

TEST(Scheduler, ScoresAPromptWithoutSampling) {
  Driver driver({64, 4, 8, 512, {1}}, 32);
  const RequestId id = driver.Add(Prompt(100, 1), 0, true);
  driver.Drain(100);
  EXPECT_EQ(driver.expected(id).num_scored, 99);
  EXPECT_TRUE(driver.expected(id).tokens.empty());
}

TEST(Scheduler, CancelsAtEveryStageWithoutALeak) {
  for (int turns = 0; turns < 12; ++turns) {
    Driver driver({16, 2, 4, 256, {1}}, 8);
    const RequestId id = driver.Add(Prompt(50, 1), 20);
    driver.Add(Prompt(5, 2), 3);
    driver.Add(Prompt(5, 3), 3);
    for (int i = 0; i < turns; ++i) driver.Turn();
    driver.Cancel(id);
    driver.Cancel(id);
    Scheduler::Deltas none;
    driver.scheduler().Cancel(12345, &none);
    EXPECT_TRUE(none.empty());
    driver.Drain(1000);
  }
}

TEST(Scheduler, PreemptsTheLastAndLosesNoToken) {
  Driver driver({64, 4, 8, 256, {1}}, 6);
  for (int i = 0; i < 4; ++i) driver.Add(Prompt(60, i), 100);
  driver.Drain(10000);
  EXPECT_GT(driver.scheduler().num_preemptions(), 0u);
}

TEST(Scheduler, LowerPriorityWaitsAndIsPreemptedFirst) {
  Driver driver({64, 2, 8, 192, {1}}, 3);  // each ends with two blocks
  const RequestId low = driver.Add(Prompt(60, 1), 60, false, 5);
  driver.Turn();
  const RequestId high = driver.Add(Prompt(60, 2), 60, false, 0);
  for (int i = 0; i < 1000 && !driver.expected(high).is_ended; ++i) driver.Turn();
  EXPECT_TRUE(driver.expected(high).is_ended);
  EXPECT_FALSE(driver.expected(low).is_ended);
  driver.Drain(1000);
}

// Random arrivals, lengths, cancels and pools against the invariants that Driver and FakeDevice check.
TEST(Scheduler, PropertyTest) {
  uint64_t steps = 0, preemptions = 0;
  for (int seed = 0; steps < 100000; ++seed) {
    std::mt19937 random(seed);
    const int max_sequences = 1 + random() % 8;
    const int num_blocks = 2 + random() % 20;
    const int max_model_len = std::min<int>(num_blocks * kBlockTokens, 64 + random() % 400);
    const SchedulerLimits limits = {1 + static_cast<int>(random() % 100),
                                    max_sequences,
                                    max_sequences + 1 + static_cast<int>(random() % 16),
                                    max_model_len,
                                    {77}};
    Driver driver(limits, num_blocks);
    std::vector<RequestId> ids;
    for (int turn = 0; turn < 400; ++turn) {
      if (random() % 3 == 0) {
        const int length = 1 + random() % (random() % 2 == 0 ? 30 : max_model_len - 1);
        const bool scores = random() % 4 == 0;
        ids.push_back(driver.Add(Prompt(length, random()), random() % 400 + (scores ? 0 : 1), scores, random() % 3));
      }
      if (!ids.empty() && random() % 40 == 0) driver.Cancel(ids[random() % ids.size()]);
      driver.Turn();
    }
    driver.Drain(1000000);
    if (testing::Test::HasFailure()) FAIL() << "seed " << seed;
    steps += driver.scheduler().num_steps();
    preemptions += driver.scheduler().num_preemptions();
  }
  std::printf("[ measured ] %llu steps, %llu preemptions\n", static_cast<unsigned long long>(steps),
              static_cast<unsigned long long>(preemptions));
  EXPECT_GT(preemptions, 20u);
}

TEST(BlockPool, GivesAllOrNothing) {
  BlockPool pool(4);
  std::vector<int32_t> blocks;
  EXPECT_TRUE(pool.Allocate(3, &blocks));
  EXPECT_FALSE(pool.Allocate(2, &blocks));
  EXPECT_EQ(blocks.size(), 3u);
  EXPECT_EQ(pool.num_free(), 1);
  pool.Release(blocks);
  EXPECT_EQ(pool.num_used(), 0);
}

TEST(BlockPoolDeathTest, ADoubleFreeIsABug) {
  BlockPool pool(4);
  std::vector<int32_t> blocks;
  ASSERT_TRUE(pool.Allocate(1, &blocks));
  pool.Release(blocks);
  EXPECT_DEATH(pool.Release(blocks), "");
}

}  // namespace
}  // namespace cachalot
