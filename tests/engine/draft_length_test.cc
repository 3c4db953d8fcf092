// DraftLength: against machines whose steps take what a formula says.
#include "engine/schedule/draft_length.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

#include "tests/engine/scheduler_driver.h"

namespace cachalot {
namespace {

// A machine, and how probable it is that a draft is right where those before it are.
struct Machine {
  std::function<double(int num_sequences, int64_t num_keys, int num_drafts)> seconds;
  double acceptance = 0.85;
  double noise = 0.02;      // of each step's time, up or down
  double outliers = 0.002;  // steps that take ten times as long
};

class World {
 public:
  World(Machine machine, int max_drafts)
      : machine_(std::move(machine)), max_drafts_(max_drafts), chooser_(max_drafts) {}

  // Tokens a second over so many steps, times without outliers.
  double Run(int num_sequences, int64_t num_keys, int num_steps, int most) {
    double tokens = 0, seconds = 0;
    for (int i = 0; i < num_steps; ++i) {
      const int num_proposed = chooser_.Next(num_sequences, num_keys, most);
      EXPECT_GE(num_proposed, 0);
      EXPECT_LE(num_proposed, most);
      const int num_verified = std::min(num_drafts_, most);
      const double exact = machine_.seconds(num_sequences, num_keys, num_verified);
      const double taken = exact * (1 + machine_.noise * Uniform(-1, 1)) * (Uniform(0, 1) < machine_.outliers ? 10 : 1);
      seconds += exact;
      if (num_verified == num_proposed) chooser_.Took(num_sequences, num_keys, num_verified, absl::Seconds(taken));
      for (int s = 0; s < num_sequences; ++s) {
        int num_right = 0;
        while (num_right < num_verified && Uniform(0, 1) < machine_.acceptance) ++num_right;
        chooser_.Verified(num_verified, num_right);
        tokens += 1 + num_right;
      }
      num_drafts_ = num_proposed;
    }
    return tokens / seconds;
  }
  double Run(int num_sequences, int64_t num_keys, int num_steps) {
    return Run(num_sequences, num_keys, num_steps, max_drafts_);
  }

  // Tokens a second with a fixed number of drafts, exactly; and the best of them.
  double Fixed(int num_sequences, int64_t num_keys, int num_drafts) const {
    double tokens = 0;
    for (int i = 0; i <= num_drafts; ++i) tokens += std::pow(machine_.acceptance, i);
    return num_sequences * tokens / machine_.seconds(num_sequences, num_keys, num_drafts);
  }
  double BestFixed(int num_sequences, int64_t num_keys) const {
    double best = 0;
    for (int k = 0; k <= max_drafts_; ++k) best = std::max(best, Fixed(num_sequences, num_keys, k));
    return best;
  }
  // As a server does at its start, but for a factor.
  void MeasureBeforehand(double factor) {
    for (int n = 1; n <= 256; n *= 2) {
      for (int k = 0; k <= max_drafts_; ++k) {
        chooser_.TookBeforehand(n, n, k, absl::Seconds(factor * machine_.seconds(n, n, k)));
      }
    }
  }
  Machine* machine() { return &machine_; }
  const DraftLength& chooser() const { return chooser_; }

 private:
  double Uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }

  Machine machine_;
  const int max_drafts_;
  DraftLength chooser_;
  std::mt19937 random_{3};
  int num_drafts_ = 0;
};

// Weights are read once, then every row costs: drafts pay for few sequences.
double LikeAGpu(int num_sequences, int64_t num_keys, int num_drafts) {
  const double rows = num_sequences * (1 + num_drafts);
  return 5e-3 + 25e-6 * rows + 2e-9 * static_cast<double>(num_keys) * (1 + num_drafts) + 0.2e-3 * num_drafts;
}

// Every row costs the same: the layer's passes come on top.
double LikeACpu(int num_sequences, int64_t, int num_drafts) {
  return num_sequences * (1e-3 * (1 + num_drafts) + 0.3e-3 * num_drafts);
}

TEST(DraftLengthTest, HardlyWorseThanTheBestFixedLength) {
  for (const auto& seconds : {std::function(LikeAGpu), std::function(LikeACpu)}) {
    for (double acceptance : {0.0, 0.3, 0.6, 0.85, 0.98, 1.0}) {
      for (int num_sequences : {1, 8, 32, 64, 128, 256}) {
        World world({seconds, acceptance}, 4);
        const int64_t num_keys = 2000 * num_sequences;
        world.Run(num_sequences, num_keys, 60);  // until every length has been tried
        const double best = world.BestFixed(num_sequences, num_keys);
        EXPECT_GT(world.Run(num_sequences, num_keys, 6000) / best, 0.97) << acceptance << " " << num_sequences;
      }
    }
  }
}

TEST(DraftLengthTest, EveryLengthIsTheBestOnSomeMachine) {
  for (int wanted = 0; wanted <= 3; ++wanted) {
    World world({[wanted](int, int64_t, int k) { return k <= wanted ? 1e-3 : 1e-2; }}, 3);
    world.Run(4, 400, 60);
    DraftLength chooser = world.chooser();
    EXPECT_EQ(chooser.Next(4, 400, 3), wanted);
  }
}

TEST(DraftLengthTest, FollowsWhatDraftsAreRight) {
  World world({LikeAGpu, 0.95}, 3);
  world.Run(1, 1000, 3000);
  EXPECT_NEAR(world.chooser().TokensOf(1), 1.95, 0.02);
  for (double acceptance : {0.01, 0.95}) {
    world.machine()->acceptance = acceptance;
    world.Run(1, 1000, 60000);  // what is not tried is not learnt: a trial comes every 600 steps
    EXPECT_GT(world.Run(1, 1000, 6000) / world.BestFixed(1, 1000), 0.97) << acceptance;
  }
}

TEST(DraftLengthTest, FollowsTheMachine) {
  World world({LikeAGpu}, 2);
  world.Run(8, 8000, 3000);
  world.machine()->seconds = LikeACpu;  // as if somebody else had taken the GPU
  world.Run(8, 8000, 6000);
  EXPECT_GT(world.Run(8, 8000, 6000) / world.BestFixed(8, 8000), 0.97);
}

// What is known beforehand is not tried: the best length from the first steps on, also for sizes between.
TEST(DraftLengthTest, BeginsWithWhatWasMeasuredBeforehand) {
  for (int num_sequences : {1, 3, 8, 11, 64, 100, 256}) {
    World world({LikeAGpu}, 4);
    world.MeasureBeforehand(1);
    DraftLength chooser = world.chooser();
    for (int i = 0; i < 200; ++i) chooser.Verified(4, 4);
    for (int i = 0; i < DraftLength::kStepsBetweenTrials - 1; ++i) {
      const int k = chooser.Next(num_sequences, 100 * num_sequences, 4);
      EXPECT_EQ(k, 4) << num_sequences << " in step " << i;  // all are right, and rows are cheap
      chooser.Took(num_sequences, 100 * num_sequences, k, absl::Seconds(LikeAGpu(num_sequences, 100, k)));
    }
  }
}

// All that was measured beforehand may be too short, or too long: no length is tried for that.
TEST(DraftLengthTest, WhatWasMeasuredBeforehandMayBeWrongByAFactor) {
  for (double factor : {0.3, 0.9, 1.1, 3.0}) {
    for (int num_sequences : {1, 8, 64, 256}) {
      World world({LikeAGpu, 0.85, 0.02, 0}, 4);
      world.MeasureBeforehand(factor);
      world.Run(num_sequences, 200 * num_sequences, 40);  // how many drafts are right is not known beforehand
      const double best = world.BestFixed(num_sequences, 200 * num_sequences);
      EXPECT_GT(world.Run(num_sequences, 200 * num_sequences, 200) / best, 0.97) << factor << " " << num_sequences;
    }
  }
}

// Sequences come and go and grow: kinds of steps are met for the first time all the while.
TEST(DraftLengthTest, LearnsLittleAnewFromKindToKind) {
  World world({LikeAGpu}, 2);
  world.Run(1, 100, 60);
  std::mt19937 random(4);
  double had = 0, best = 0;
  for (int i = 0; i < 300; ++i) {
    const int num_sequences = 1 + static_cast<int>(random() % 256);
    const int64_t num_keys = num_sequences * static_cast<int64_t>(100 + random() % 4000);
    const double rate = world.Run(num_sequences, num_keys, 40);
    had += rate / world.BestFixed(num_sequences, num_keys);
    ++best;
  }
  std::printf("[ measured ] %.3f of the best fixed length's rate, by 40 steps of 300 loads\n", had / best);
  EXPECT_GT(had / best, 0.95);
}

// One sequence ends every other step: no kind of step lasts.
TEST(DraftLengthTest, LearnsWhileEveryStepIsOfAnotherKind) {
  World world({LikeACpu, 0.5}, 4);  // drafts never pay
  double had = 0, best = 0;
  for (int num_sequences = 100; num_sequences > 0; --num_sequences) {
    const double rate = world.Run(num_sequences, 100 * num_sequences, 2);
    if (num_sequences > 50) continue;
    had += rate;
    best += world.BestFixed(num_sequences, 100 * num_sequences);
  }
  EXPECT_GT(had / best, 0.8);
}

TEST(DraftLengthTest, NoMoreThanThereIsRoomFor) {
  World world({LikeAGpu, 1.0}, 4);
  world.Run(1, 1000, 1000, 4);
  world.Run(1, 1000, 2000, 1);
  World narrow({LikeAGpu, 1.0}, 4);
  narrow.Run(1, 1000, 60, 2);
  EXPECT_GT(narrow.Run(1, 1000, 3000, 2) / narrow.Fixed(1, 1000, 2), 0.97);
  DraftLength none(0);
  EXPECT_EQ(none.Next(5, 100, 0), 0);
  none.Took(5, 100, 0, absl::Milliseconds(1));
  DraftLength some(3);
  EXPECT_EQ(some.Next(0, 0, 3), 3) << "nothing decodes: what prompts propose";
  some.Took(1, 100, 3, absl::ZeroDuration());  // a clock set back
  some.Took(1, 100, 3, -absl::Seconds(1));
  some.TookBeforehand(1, 100, 3, absl::ZeroDuration());
  EXPECT_EQ(some.Next(1, 100, 3), 3) << "nothing is known: the first trial";
}

// Where ranks agree on more drafts than this one asked for, or it is told of none.
TEST(Scheduler, VerifiesAsManyDraftsAsItIsToldWereProposed) {
  SchedulerLimits limits = {64, 4, 512, {1}};  // no token of the fake model ends an answer
  limits.max_drafts = 3;
  limits.adapts_drafts = true;
  SchedulerDriver driver(limits, 32);
  driver.Add(10, {.max_tokens = 30});
  driver.Turn();
  for (const int num_drafts : {0, 3, 1, 2}) {
    driver.scheduler().Proposes(num_drafts);
    driver.Turn();
    ASSERT_EQ(driver.last_plan().sequences.size(), 1u);
    EXPECT_EQ(driver.last_plan().sequences[0].num_rows, 1 + num_drafts);
  }
}

}  // namespace
}  // namespace cachalot
