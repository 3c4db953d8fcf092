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
                                            .leaver = is_leaving ? r + 1 : 0,
                                            .num_proposed = (round + r) % 4,
                                            .work = int64_t{r} << 40});
        ASSERT_TRUE(agreed.ok());
        EXPECT_EQ(agreed->has_work, round % 2 == 0 ? 1 : 0);
        EXPECT_EQ(agreed->leaver, round == 99 ? 2 : 0);
        EXPECT_EQ(agreed->num_proposed, round % 4 == 0 ? 2 : 3);
        EXPECT_EQ(agreed->work, int64_t{2} << 40);
      }
      EXPECT_EQ(agreement.num_votes(), 100u);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

std::vector<int> Sizes(const StepVote& vote) { return {vote.num_sequences, vote.num_tokens, vote.num_rows}; }

TEST(StepAgreement, ShapesHoldThoseOfAll) {
  const auto agree = [](std::vector<StepVote> votes) {
    auto ranks = MakeThreadMesh(static_cast<int>(votes.size()));
    std::vector<StepVote> agreed(votes.size());
    std::vector<std::thread> threads;
    for (size_t r = 0; r < votes.size(); ++r) {
      threads.emplace_back([&, r] { agreed[r] = *StepAgreement(ranks[r].get()).Vote(votes[r]); });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(agreed[0].num_tokens, agreed.back().num_tokens);
    return agreed[0];
  };
  const StepVote none, eight = {.has_work = 1, .num_sequences = 8, .num_tokens = 8, .num_rows = 8};
  const StepVote two = {.has_work = 1, .num_sequences = 2, .num_tokens = 2, .num_rows = 2};
  const StepVote drafts = {.has_work = 1, .num_sequences = 4, .num_tokens = 8, .num_rows = 8};
  const StepVote chunk = {.has_work = 1, .is_mixed = 1, .num_sequences = 1, .num_tokens = 512, .num_rows = 1};
  StepVote agreed = agree({none, eight, two});
  EXPECT_EQ(agreed.is_mixed, 0);
  EXPECT_EQ(Sizes(agreed), std::vector<int>({8, 8, 8}));
  agreed = agree({none, eight, drafts});  // one and two rows a sequence
  EXPECT_EQ(agreed.is_mixed, 1);
  agreed = agree({two, chunk});
  EXPECT_EQ(agreed.is_mixed, 1);
  EXPECT_EQ(Sizes(agreed), std::vector<int>({2, 512, 2}));
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
