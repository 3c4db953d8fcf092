// Scheduler and block pool, rule by rule; the invariants of every step are SchedulerDriver's.
#include "engine/schedule/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/engine/scheduler_driver.h"

namespace cachalot {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using Driver = SchedulerDriver;

// Limits: rows of a step, slots, tokens of a sequence, end of sequence.
constexpr int kNoEos = 1;  // the fake model's tokens begin at 3

SchedulerLimits Limits(int max_batch_tokens, int max_sequences, int max_model_len = 512) {
  return {max_batch_tokens, max_sequences, max_model_len, {kNoEos}};
}

void TurnsUntilEnd(Driver& driver, RequestId id, int max_turns = 2000) {
  while (driver.record(id).reason == FinishReason::kNone && max_turns-- > 0) driver.Turn();
  EXPECT_NE(driver.record(id).reason, FinishReason::kNone);
}

TEST(Scheduler, ChunksAPromptAndKeepsTwoStepsInFlight) {
  Driver driver(Limits(64, 4), 32);
  driver.Add(150, {.max_tokens = 5});
  driver.Turn();
  StepPlan plan = driver.last_plan();
  EXPECT_EQ(plan.num_rows, 64);
  EXPECT_EQ(plan.sequences[0].params.apply, 1);
  EXPECT_TRUE(plan.logits_rows.empty());
  EXPECT_EQ(plan.block_updates.size(), 3u) << "the whole prompt's blocks are taken at its start";
  EXPECT_EQ(driver.scheduler().num_in_flight(), 1);
  plan = driver.scheduler().Plan(absl::UnixEpoch());
  EXPECT_EQ(plan.sequences[0].start, 64);
  EXPECT_EQ(plan.sequences[0].params.apply, 0);
  EXPECT_TRUE(plan.block_updates.empty());
  EXPECT_EQ(driver.scheduler().num_in_flight(), 2);
}

TEST(Scheduler, DecodesWithoutKnowingTheTokenYet) {
  Driver driver(Limits(64, 4), 32);
  driver.Add(10, {.max_tokens = 3});
  driver.Turn();
  EXPECT_EQ(driver.last_plan().logits_rows.size(), 1u);
  driver.Turn();
  ASSERT_EQ(driver.last_plan().sequences.size(), 1u);
  EXPECT_EQ(driver.last_plan().sequences[0].start, -1);
}

TEST(Scheduler, ScoresAPromptWithoutSampling) {
  Driver driver(Limits(64, 4), 32);
  const RequestId id = driver.Add(100, {.max_tokens = 0, .scores = true});
  driver.Drain(100);
  EXPECT_EQ(driver.record(id).num_scored, 99);
  EXPECT_TRUE(driver.record(id).tokens.empty());
  EXPECT_EQ(driver.stats().steps, 2u) << "as fast as any other prompt";
}

// ---- Ends ----

TEST(Scheduler, CancelsAtEveryStageWithoutALeak) {
  for (int turns = 0; turns < 12; ++turns) {
    Driver driver(Limits(16, 2, 256), 8);
    const RequestId id = driver.Add(50, {.max_tokens = 20});
    driver.Add(5, {.max_tokens = 3});
    driver.Add(5, {.max_tokens = 3});
    for (int i = 0; i < turns; ++i) driver.Turn();
    driver.Cancel(id);
    driver.Cancel(id);
    EXPECT_EQ(driver.record(id).reason, FinishReason::kCancelled);
    Scheduler::Deltas none;
    driver.scheduler().Cancel(12345, absl::UnixEpoch(), &none);
    EXPECT_TRUE(none.empty());
    driver.Drain(1000);
  }
}

TEST(Scheduler, ADeadlineEndsARequestAtEveryStage) {
  bool was_waiting = false, was_prefilling = false, was_decoding = false;
  for (int turns = 1; turns < 14; ++turns) {
    Driver driver(Limits(16, 1, 256), 4);
    if (turns == 1) driver.Add(100, {.max_tokens = 50});  // takes the only slot
    const RequestId id = driver.Add(64, {.max_tokens = 50, .deadline_turns = turns + 1});
    for (int i = 0; i < turns; ++i) driver.Turn();
    EXPECT_EQ(driver.record(id).reason, FinishReason::kNone);
    was_waiting |= driver.record(id).live->slot < 0;
    was_decoding |= driver.record(id).live->is_decoding;
    was_prefilling |= driver.record(id).live->num_fed > 0 && !driver.record(id).live->is_decoding;
    driver.Turn();
    EXPECT_EQ(driver.record(id).reason, FinishReason::kError);
    EXPECT_EQ(driver.record(id).error.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(driver.record(id).error.message()), HasSubstr("deadline"));
    driver.Drain(1000);
  }
  EXPECT_TRUE(was_waiting && was_prefilling && was_decoding);
}

TEST(Scheduler, ADeadlineEndsAPreemptedRequest) {
  Driver driver(Limits(64, 1, 256), 4);
  const RequestId low = driver.Add(60, {.max_tokens = 100, .priority = 1, .deadline_turns = 12});
  for (int i = 0; i < 4; ++i) driver.Turn();
  driver.Add(60, {.max_tokens = 100});
  for (int i = 0; i < 4; ++i) driver.Turn();
  EXPECT_LT(driver.record(low).live->slot, 0) << "waits again";
  for (int i = 0; i < 4; ++i) driver.Turn();
  EXPECT_EQ(driver.record(low).error.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(driver.record(low).times.num_preemptions, 1);
  EXPECT_GT(driver.record(low).times.decode, absl::ZeroDuration());
  driver.Drain(1000);
}

TEST(Scheduler, TellsWhereTheTimeWent) {
  Driver driver(Limits(16, 1), 32);  // a turn takes a second, a step is committed the turn after it was planned
  const RequestId first = driver.Add(40, {.max_tokens = 5});
  const RequestId second = driver.Add(10, {.max_tokens = 1});
  const RequestId cancelled = driver.Add(10, {.max_tokens = 1});
  TurnsUntilEnd(driver, first);
  driver.Cancel(cancelled);
  driver.Drain(100);
  const RequestTimes& times = driver.record(first).times;
  EXPECT_EQ(times.queued, absl::Seconds(1));
  EXPECT_EQ(times.prefill, absl::Seconds(3)) << "three chunks and a turn";
  EXPECT_EQ(times.decode, absl::Seconds(4));
  EXPECT_EQ(times.num_preemptions, 0);
  EXPECT_GT(driver.record(second).times.queued, absl::Seconds(7));
  EXPECT_EQ(driver.record(second).times.decode, absl::ZeroDuration());
  EXPECT_EQ(driver.record(cancelled).times.queued, absl::Seconds(8));
  EXPECT_EQ(driver.record(cancelled).times.prefill, absl::ZeroDuration());
}

TEST(Scheduler, FailingTellsEverybodyWithTimes) {
  BlockPool pool(8);
  Scheduler scheduler(Limits(16, 1), &pool);
  for (RequestId id : {1, 2}) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = id;
    sequence->tokens = {5, 6};
    sequence->num_prompt_tokens = 2;
    sequence->submitted = absl::UnixEpoch();
    scheduler.Add(std::move(sequence));
  }
  scheduler.Plan(absl::UnixEpoch() + absl::Seconds(2));
  Scheduler::Deltas deltas;
  scheduler.Fail(absl::UnavailableError("gone"), absl::UnixEpoch() + absl::Seconds(5), &deltas);
  ASSERT_EQ(deltas.size(), 2u);
  for (const auto& [id, delta] : deltas) {
    EXPECT_EQ(delta.finish_reason, FinishReason::kError);
    EXPECT_EQ(delta.times.queued, absl::Seconds(id == 1 ? 2 : 5));
    EXPECT_EQ(delta.times.prefill, absl::Seconds(id == 1 ? 3 : 0));
  }
}

// ---- Rows ----

TEST(Scheduler, HalfOfTheRowsToTheEarliestPromptHalfToTheShortest) {
  Driver driver(Limits(64, 8), 64);
  const RequestId decoding = driver.Add(1, {.max_tokens = 100});
  driver.Turn();
  const RequestId longest = driver.Add(300, {}), longer = driver.Add(200, {});
  const RequestId small = driver.Add(20, {}), smaller = driver.Add(8, {});
  driver.Turn();
  EXPECT_THAT(driver.LastRows(),
              ElementsAre(Pair(decoding, 1), Pair(longest, 32), Pair(longer, 3), Pair(small, 20), Pair(smaller, 8)));
  driver.Turn();
  EXPECT_THAT(driver.LastRows(),
              ElementsAre(Pair(decoding, 1), Pair(longest, 31), Pair(longer, 30), Pair(small, 1), Pair(smaller, 1)));
  driver.Drain(1000);
}

TEST(Scheduler, WhatOneHalfLeavesGoesToTheOther) {
  Driver driver(Limits(64, 8), 64);
  const RequestId longest = driver.Add(300, {}), small = driver.Add(10, {});
  driver.Turn();
  EXPECT_THAT(driver.LastRows(), ElementsAre(Pair(longest, 54), Pair(small, 10)));
  driver.Drain(1000);
  const RequestId early = driver.Add(5, {}), late = driver.Add(300, {});
  driver.Turn();
  EXPECT_THAT(driver.LastRows(), ElementsAre(Pair(early, 5), Pair(late, 59)));
  driver.Drain(1000);
}

// Short prompts that never cease to arrive do not starve a long one, nor it them.
TEST(Scheduler, ALongPromptAndShortOnesBothAdvance) {
  Driver driver(Limits(32, 8, 2048), 64);
  const RequestId longest = driver.Add(1600, {.max_tokens = 1});
  int turns = 0;
  absl::Duration slowest;
  std::vector<RequestId> ids;
  for (; driver.record(longest).reason == FinishReason::kNone; ++turns) {
    ids.push_back(driver.Add(12, {.max_tokens = 1}));
    driver.Turn();
    ASSERT_LT(turns, 1000);
  }
  EXPECT_LE(turns, 1600 / 16 + 4) << "it has half of the rows";
  driver.Drain(1000);
  for (RequestId id : ids) slowest = std::max(slowest, driver.record(id).times.queued);
  EXPECT_LE(slowest, absl::Seconds(2));
}

TEST(Scheduler, DecodingComesBeforePromptsOfWhateverPriority) {
  Driver driver(Limits(8, 8), 64);
  for (int i = 0; i < 6; ++i) driver.Add(1, {.max_tokens = 100, .priority = 1});
  driver.Turn();
  const RequestId high = driver.Add(12, {.max_tokens = 1});
  for (int i = 0; i < 6; ++i) {
    driver.Turn();
    EXPECT_EQ(driver.LastRows().size(), 7u);
    EXPECT_EQ(driver.LastRows().at(high), 2);
  }
  driver.Drain(1000);
}

TEST(Scheduler, PromptsByPriorityBesideTheFirst) {
  Driver driver(Limits(64, 8), 64);
  const RequestId first = driver.Add(300, {}), low = driver.Add(20, {.priority = 1}), high = driver.Add(300, {});
  driver.Turn();
  EXPECT_THAT(driver.LastRows(), ElementsAre(Pair(first, 32), Pair(high, 32)));
  driver.Drain(1000);
  EXPECT_EQ(driver.record(low).reason, FinishReason::kLength);
}

TEST(Scheduler, ManyPromptsOfOneClientHoldUpNobodyElses) {
  Driver driver(Limits(64, 32, 256), 128);
  for (int i = 0; i < 20; ++i) driver.Add(40, {.client = "many"});
  const RequestId other = driver.Add(50, {.client = "other"});
  driver.Turn();
  driver.Turn();
  EXPECT_THAT(driver.LastRows(), testing::Contains(Pair(other, testing::Ge(10))));
  driver.Turn();
  EXPECT_TRUE(driver.record(other).live->is_decoding);
  driver.Drain(1000);
}

// ---- Pressure ----

TEST(Scheduler, PreemptsTheLastAndLosesNoToken) {
  Driver driver(Limits(64, 4, 256), 6);
  for (int i = 0; i < 4; ++i) driver.Add(60, {.max_tokens = 100});
  driver.Drain(10000);
  EXPECT_EQ(driver.record(1).times.num_preemptions, 0);
  EXPECT_GT(driver.record(3).times.num_preemptions, 0) << "the last for which there was room at first";
  const EngineStats stats = driver.stats();
  EXPECT_GT(stats.preemptions, 0u);
  EXPECT_EQ(stats.prompt_tokens, 240u) << "each prompt counts once";
  EXPECT_GE(stats.recomputed_tokens, 60u);
  EXPECT_EQ(stats.generated_tokens, 400u);
}

TEST(Scheduler, PreemptsLowerPriorityForASlot) {
  Driver driver(Limits(64, 2), 64);
  const RequestId low = driver.Add(10, {.max_tokens = 50, .priority = 5});
  const RequestId lower = driver.Add(10, {.max_tokens = 50, .priority = 6});
  for (int i = 0; i < 5; ++i) driver.Turn();
  const RequestId high = driver.Add(10, {.max_tokens = 20});
  TurnsUntilEnd(driver, high, 26);
  EXPECT_EQ(driver.record(lower).live->num_preemptions, 1);
  EXPECT_EQ(driver.record(low).live->num_preemptions, 0);
  driver.Drain(1000);
  EXPECT_EQ(driver.stats().preemptions, 1u);
}

TEST(Scheduler, PreemptsLowerPriorityForBlocksLatestFirst) {
  Driver driver(Limits(256, 8, 512), 8);
  const RequestId early = driver.Add(100, {.max_tokens = 10, .priority = 1});
  const RequestId late = driver.Add(100, {.max_tokens = 10, .priority = 1});
  for (int i = 0; i < 3; ++i) driver.Turn();
  const RequestId high = driver.Add(300, {.max_tokens = 2});  // five blocks and one to spare; four are free
  TurnsUntilEnd(driver, high, 8);
  EXPECT_EQ(driver.record(early).live != nullptr ? driver.record(early).live->num_preemptions : 0, 0);
  EXPECT_EQ(driver.record(late).live->num_preemptions, 1);
  driver.Drain(1000);
}

TEST(Scheduler, NeverPreemptsForEqualPriority) {
  Driver driver(Limits(64, 1), 64);
  driver.Add(10, {.max_tokens = 100});
  const RequestId second = driver.Add(10, {.max_tokens = 5});
  for (int i = 0; i < 50; ++i) driver.Turn();
  EXPECT_LT(driver.record(second).live->slot, 0);
  EXPECT_EQ(driver.stats().waiting_for_slots, 1);
  EXPECT_EQ(driver.stats().waiting_for_blocks, 0);
  driver.Drain(1000);
  EXPECT_EQ(driver.stats().preemptions, 0u);
}

TEST(Scheduler, PreemptsNobodyInVain) {
  Driver driver(Limits(512, 4, 512), 8);
  driver.Add(300, {.max_tokens = 60});                // five blocks of eight
  driver.Add(30, {.max_tokens = 30, .priority = 1});  // one block
  for (int i = 0; i < 3; ++i) driver.Turn();
  driver.Add(200, {.max_tokens = 5});  // four blocks: not to be had while the first runs, whoever goes
  for (int i = 0; i < 20; ++i) driver.Turn();
  EXPECT_EQ(driver.stats().preemptions, 0u);
  EXPECT_EQ(driver.stats().waiting_for_blocks, 1);
  driver.Drain(1000);
  EXPECT_EQ(driver.stats().preemptions, 0u);
}

TEST(Scheduler, RunsNoMoreThanAStepHasRows) {
  Driver driver(Limits(2, 8), 64);
  for (int i = 0; i < 4; ++i) driver.Add(1, {.max_tokens = 20, .priority = 1});
  driver.Turn();
  EXPECT_EQ(driver.stats().running, 2);
  EXPECT_EQ(driver.stats().waiting_for_slots, 2);
  const RequestId high = driver.Add(1, {.max_tokens = 20});
  TurnsUntilEnd(driver, high, 25);
  driver.Drain(1000);
  EXPECT_EQ(driver.stats().preemptions, 1u);
}

// ---- Order and turns ----

// Requests of priority -1000 that never cease to arrive overtake an ordinary one for a while only, and preempt nobody.
TEST(Scheduler, RaisingOneselfIsOfLittleUse) {
  Driver driver(Limits(64, 2), 64);
  driver.Add(1, {.max_tokens = 5, .client = "ordinary"});
  const RequestId ordinary = driver.Add(1, {.max_tokens = 5, .client = "ordinary"});
  for (int i = 0; driver.record(ordinary).reason == FinishReason::kNone; ++i) {
    driver.Add(1, {.max_tokens = 5, .priority = -1000, .client = std::to_string(i)});
    driver.Turn();
    ASSERT_LT(i, 100);
  }
  EXPECT_LE(driver.record(ordinary).times.queued, absl::Seconds(10)) << "two turns of those that run";
  driver.Drain(10000);
  EXPECT_EQ(driver.stats().preemptions, 0u);
}

// So do ordinary ones with one of low priority, whose time comes: kPriorityStep for every unit.
TEST(Scheduler, LowPriorityAges) {
  Driver driver(Limits(64, 1), 64);
  driver.Add(1, {.max_tokens = 5});
  const RequestId low = driver.Add(1, {.max_tokens = 5, .priority = 4});
  for (int i = 0; driver.record(low).reason == FinishReason::kNone; ++i) {
    driver.Add(1, {.max_tokens = 2});
    driver.Turn();
    ASSERT_LT(i, 1000);
  }
  EXPECT_GT(driver.record(low).times.queued, 4 * Admission::kPriorityStep);
  EXPECT_LE(driver.record(low).times.num_preemptions, Admission::kMaxGivingWay);
  driver.Drain(100000);
}

TEST(Scheduler, GivesWayTwiceAtMost) {
  Driver driver(Limits(64, 1), 64);
  const RequestId low = driver.Add(1, {.max_tokens = 100, .priority = 100});
  for (int i = 0; driver.record(low).reason == FinishReason::kNone; ++i) {
    if (i % 20 == 5) driver.Add(1, {.max_tokens = 5});
    driver.Turn();
    ASSERT_LT(i, 1000);
  }
  EXPECT_EQ(driver.record(low).times.num_preemptions, 2);
  driver.Drain(1000);
}

// Who has a thousand under way, and who has one.
TEST(Scheduler, ClientsTakeTurns) {
  Driver driver(Limits(64, 4), 64);
  for (int i = 0; i < 100; ++i) driver.Add(1, {.max_tokens = 5 + i % 4, .client = "many"});
  for (int i = 0; i < 10; ++i) driver.Turn();
  const RequestId one = driver.Add(1, {.max_tokens = 5, .client = "one"});
  TurnsUntilEnd(driver, one, 30);
  EXPECT_LE(driver.record(one).times.queued, absl::Seconds(5));
  driver.Drain(10000);
}

// Where nothing ends soon, one that runs gives way to a client that has nothing running, but to no more of its own.
TEST(Scheduler, AClientWithNothingRunningIsNotKeptWaiting) {
  Driver driver(Limits(64, 4), 64);
  for (int i = 0; i < 4; ++i) driver.Add(1, {.max_tokens = 400, .client = "many"});
  for (int i = 0; i < 10; ++i) driver.Turn();
  const RequestId low = driver.Add(1, {.max_tokens = 5, .priority = 1, .client = "low"});
  const RequestId one = driver.Add(1, {.max_tokens = 50, .client = "one"});
  const RequestId another = driver.Add(1, {.max_tokens = 50, .client = "one"});
  for (int i = 0; i < 20; ++i) driver.Turn();
  EXPECT_LE(driver.record(one).live->first_step, driver.record(one).submitted + absl::Seconds(5));
  EXPECT_LT(driver.record(low).live->slot, 0) << "who lowered himself preempts nobody";
  EXPECT_LT(driver.record(another).live->slot, 0);
  EXPECT_EQ(driver.stats().preemptions, 1u);
  driver.Drain(10000);
}

// Room that nobody makes is for whose turn it is: small requests of clients that have nothing running do not pass a
// large one that waits for blocks, one after the other.
TEST(Scheduler, SmallRequestsDoNotPassALargeOneForEver) {
  Driver driver(Limits(64, 4, 640), 12);
  driver.Add(250, {.max_tokens = 200, .client = "large"});
  for (int i = 0; i < 10; ++i) driver.Turn();
  const RequestId large = driver.Add(500, {.max_tokens = 5, .client = "large"});
  std::vector<RequestId> small;
  for (int i = 0; i < 300; ++i) {
    if (i % 10 == 0) small.push_back(driver.Add(1, {.max_tokens = 5, .client = "small" + std::to_string(i)}));
    driver.Turn();
  }
  driver.Drain(10000);
  const auto start = [&](RequestId id) { return driver.record(id).submitted + driver.record(id).times.queued; };
  int num_passed = 0;
  for (RequestId id : small) num_passed += start(id) < start(large) ? 1 : 0;
  EXPECT_LE(num_passed, 1);
}

// For blocks too; whoever has the most gives way, the last of them, and never the first of all.
TEST(Scheduler, TheClientWithTheMostGivesWayForBlocks) {
  Driver driver(Limits(64, 8, 256), 12);
  const RequestId first = driver.Add(60, {.max_tokens = 150, .client = "many"});
  std::vector<RequestId> many;
  for (int i = 0; i < 3; ++i) many.push_back(driver.Add(60, {.max_tokens = 150, .client = "many"}));
  const RequestId one = driver.Add(60, {.max_tokens = 150, .client = "one"});
  driver.Drain(10000);
  EXPECT_EQ(driver.record(first).times.num_preemptions, 0);
  EXPECT_EQ(driver.record(one).times.num_preemptions, 0);
  EXPECT_GT(driver.record(many.back()).times.num_preemptions, 0);
}

// ---- What a step carries ----

TEST(Scheduler, BringsBannedAndBiasedTokensToTheSlotEachTimeItIsEntered) {
  Driver driver(Limits(64, 1), 64);
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = {5, 6, 7};
  sequence->num_prompt_tokens = 3;
  sequence->priority = 1;
  sequence->sampling.max_tokens = 50;
  sequence->sampling.min_tokens = 2;
  sequence->sampling.stop_token_ids = {900, kNoEos, 900};
  sequence->sampling.logit_bias = {{12, -3.0f}, {13, 0.5f}};
  driver.Add(std::move(sequence));
  const auto expect_entered = [&] {
    ASSERT_EQ(driver.last_plan().sequences.size(), 1u);
    const SequenceStep& step = driver.last_plan().sequences[0];
    EXPECT_EQ(step.params.apply, 1);
    EXPECT_EQ(step.params.min_tokens, 2);
    EXPECT_EQ(step.params.num_banned, 2);
    EXPECT_EQ(step.params.num_biased, 2);
    std::vector<std::pair<int32_t, float>> entries;
    for (const TokenBias& entry : step.token_biases) entries.emplace_back(entry.token, entry.bias);
    EXPECT_THAT(entries, ElementsAre(Pair(kNoEos, 0), Pair(900, 0), Pair(12, -3.0f), Pair(13, 0.5f)));
  };
  driver.Turn();
  expect_entered();
  driver.Turn();
  EXPECT_TRUE(driver.last_plan().sequences[0].token_biases.empty());
  const RequestId high = driver.Add(3, {.max_tokens = 3});
  TurnsUntilEnd(driver, high);
  while (driver.last_plan().empty() || driver.last_plan().sequences[0].params.apply == 0) driver.Turn();
  expect_entered();
  EXPECT_EQ(driver.last_plan().sequences[0].params.prompt_tokens, 3) << "generated tokens are no prompt";
  EXPECT_GT(driver.last_plan().sequences[0].num_rows, 3);
}

// What would make logits overflow means the same as what does not.
TEST(Scheduler, TheEndsOfRangesDoNotOverflow) {
  Driver driver(Limits(64, 1), 64);
  const auto params_of = [&driver](float temperature, float repetition_penalty) {
    auto sequence = std::make_unique<Sequence>();
    sequence->tokens = {5};
    sequence->num_prompt_tokens = 1;
    sequence->sampling.temperature = temperature;
    sequence->sampling.repetition_penalty = repetition_penalty;
    sequence->sampling.max_tokens = 1;
    driver.Add(std::move(sequence));
    driver.Turn();
    const SlotParams params = driver.last_plan().sequences.at(0).params;
    driver.Drain(10);
    return params;
  };
  for (float temperature : {0.0f, 1e-45f, 1.1754944e-38f, 3e-38f, 1e-37f, 9e-6f}) {
    EXPECT_EQ(params_of(temperature, 1.0f).temperature, 0.0f) << temperature;
  }
  for (float temperature : {1e-5f, 0.7f, 3e38f}) EXPECT_EQ(params_of(temperature, 1.0f).temperature, temperature);
  for (float penalty : {1e-45f, 1e-30f}) EXPECT_FLOAT_EQ(params_of(1.0f, penalty).repetition_penalty, 1e-10f);
  for (float penalty : {1e11f, 3e38f}) EXPECT_EQ(params_of(1.0f, penalty).repetition_penalty, 1e10f);
  for (float penalty : {0.5f, 1.0f, 7.0f}) EXPECT_EQ(params_of(1.0f, penalty).repetition_penalty, penalty);
}

TEST(Scheduler, CountsTheRowsOfSteps) {
  StepRowsHistogram rows;
  for (int n : {1, 2, 8, 9, 600, 20000}) rows.Add(n);
  EXPECT_THAT(rows.at_most, ElementsAre(1, 3, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5));
  EXPECT_EQ(rows.count, 6u);
  EXPECT_EQ(rows.sum, 20620u);
}

}  // namespace
}  // namespace cachalot
