// StepWatch: limits follow what steps of that size took.
#include "engine/step_watch.h"

#include <gtest/gtest.h>

namespace cachalot {
namespace {

constexpr absl::Duration kLeast = absl::Seconds(5);

class StepWatchTest : public testing::Test {
 protected:
  absl::Duration Limit(int64_t work) {
    StepWatch watch = watch_;
    watch.Launched(work, now_);
    return watch.Limit();
  }
  void Run(int64_t work, absl::Duration time) {
    watch_.Launched(work, now_);
    watch_.Completed(now_ += time);
  }

  StepWatch watch_{kLeast};
  absl::Time now_ = absl::UnixEpoch();
};

TEST_F(StepWatchTest, KnowsNothingAtFirst) { EXPECT_EQ(Limit(1), StepWatch::kUnknown); }

TEST_F(StepWatchTest, QuickStepsHaveTheLeast) {
  Run(512, absl::Milliseconds(50));
  EXPECT_EQ(Limit(512), kLeast);
  EXPECT_EQ(Limit(4096), kLeast) << "eight times as much work";
  Run(1, absl::Milliseconds(10));
  EXPECT_EQ(Limit(1), kLeast);
}

// A slow machine, whose longest step comes after quick ones: in proportion, then as measured.
TEST_F(StepWatchTest, LongerStepsThanAnyBeforeHaveTime) {
  Run(4, absl::Seconds(2));
  EXPECT_EQ(Limit(4), absl::Seconds(20));
  EXPECT_EQ(Limit(512), 128 * absl::Seconds(20));
  Run(512, absl::Seconds(60));
  EXPECT_EQ(Limit(512), absl::Seconds(600));
  EXPECT_EQ(Limit(2048), absl::Seconds(2400));
  EXPECT_EQ(Limit(7), absl::Seconds(20)) << "what long ones take is no matter to short ones";
}

TEST_F(StepWatchTest, ASlowStepIsForgotten) {
  Run(8, absl::Seconds(4));
  EXPECT_EQ(Limit(8), absl::Seconds(40));
  for (int i = 0; i < 30; ++i) Run(8, absl::Milliseconds(20));
  EXPECT_EQ(Limit(8), kLeast);
}

TEST_F(StepWatchTest, WhatWaitsBehindAnotherStepHasNotBegun) {
  watch_.Launched(8, now_);
  watch_.Launched(8, now_);
  now_ += absl::Seconds(2);
  watch_.Completed(now_);
  now_ += absl::Seconds(2);
  watch_.Completed(now_);
  EXPECT_EQ(Limit(8), absl::Seconds(20)) << "not twice that";
}

TEST_F(StepWatchTest, KeysCount) {
  EXPECT_EQ(StepWatch::WorkOf(100, 0), 100);
  EXPECT_EQ(StepWatch::WorkOf(100, 100 * 4096), 200);
  EXPECT_EQ(StepWatch::WorkOf(1, int64_t{1} << 40), 1 + (int64_t{1} << 28)) << "no overflow";
}

}  // namespace
}  // namespace cachalot
