// StepAgreement: all get the same, and nothing else passes for a vote.
#include "engine/step_agreement.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace cachalot {
namespace {

TEST(StepAgreement, JoinsTheVotesOfAll) {
  auto ranks = MakeThreadMesh(3);
  std::vector<std::thread> threads;
  for (int r = 0; r < 3; ++r) {
    threads.emplace_back([&, r] {
      StepAgreement agreement(ranks[r].get());
      for (int round = 0; round < 100; ++round) {
        const bool has_work = round % 3 == r && round % 2 == 0, is_leaving = round == 99 && r == 1;
        const auto agreed = agreement.Vote({.has_work = has_work ? 1 : 0,
                                            .is_leaving = is_leaving ? 1 : 0,
                                            .num_proposed = (round + r) % 4,
                                            .work = int64_t{r} << 40});
        ASSERT_TRUE(agreed.ok());
        EXPECT_EQ(agreed->has_work, round % 2 == 0 ? 1 : 0);
        EXPECT_EQ(agreed->is_leaving, round == 99 ? 1 : 0);
        EXPECT_EQ(agreed->num_proposed, round % 4 == 0 ? 2 : 3);
        EXPECT_EQ(agreed->work, int64_t{2} << 40);
      }
      EXPECT_EQ(agreement.num_votes(), 100u);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(StepAgreement, WhoSpeaksOtherwiseIsNamed) {
  auto ranks = MakeThreadMesh(2);
  std::thread other([&] {
    ranks[1]->outbox(0).assign(5, 'x');
    EXPECT_TRUE(ranks[1]->Exchange().ok());
  });
  StepAgreement agreement(ranks[0].get());
  EXPECT_EQ(agreement.Vote({}).status(), absl::InternalError("rank 1 votes with 5 bytes"));
  other.join();
  ranks[1]->Abort(absl::AbortedError("rank 1: gone"));
  EXPECT_EQ(agreement.Vote({}).status(), absl::AbortedError("rank 1: gone"));
}

}  // namespace
}  // namespace cachalot
