// UpdateBlockTables, BeginStep and CountTokens, and what slots remember over steps with drafts.
#include <gtest/gtest.h>

#include "tests/kernels/step_world.h"

namespace cachalot {
namespace {

using testing::Entering;
using testing::Owned;
using testing::Step;
using testing::StepWorld;
using Ints = std::vector<int32_t>;

class StepsTest : public ::testing::Test {
 protected:
  Ops& ops() { return backend_->ops(); }
  void Begin(StepWorld& world, Step& step) { ops().BeginStep(step.step_rows, world.state, step.input); }

  // Samples greedily with logits that make row l choose wanted[l].
  void Sample(StepWorld& world, Step& step, const Ints& wanted, int64_t vocab) {
    Owned logits = StepWorld::Zeroed(DType::kF32, {static_cast<int64_t>(wanted.size()), vocab});
    for (size_t l = 0; l < wanted.size(); ++l) logits->row<float>(l)[wanted[l]] = 5;
    ops().Sample(step.out, world.state, logits, Tensor(), step.input, step.step_rows, static_cast<int>(vocab));
  }

  std::unique_ptr<Backend> backend_ = testing::MakeTestBackend(testing::CpuOptions());
};

TEST_F(StepsTest, UpdateBlockTables) {
  StepWorld world(3, 0, 10, false);
  Owned updates(DType::kI32, {4, 3});
  ops().UpdateBlockTables(world.state, updates.Set({2, 1, 77, -1, 5, 9, 0, 3, 8, 2, 1, 78}));
  EXPECT_EQ(Step::Ints(world.block_table), (Ints{0, 0, 0, 8, 0, 0, 0, 0, 0, 78, 0, 0}));
  ops().UpdateBlockTables(world.state, Owned(DType::kI32, {0, 3}));
}

TEST_F(StepsTest, UpdateTokenBiases) {
  StepWorld world(3, 0, 10, false);
  ops().UpdateTokenBiases(world.state, testing::BiasUpdates(2, {{7, 0.0f}, {3, -1.5f}}));
  ops().UpdateTokenBiases(world.state, testing::BiasUpdates(1, {{9, 100.0f}}));
  EXPECT_EQ(world.Entry(2, 0).token, 7);
  EXPECT_EQ(world.Entry(2, 1).token, 3);
  EXPECT_EQ(world.Entry(2, 1).bias, -1.5f);
  EXPECT_EQ(world.Entry(1, 0).token, 9);
  EXPECT_EQ(world.Entry(1, 0).bias, 100.0f);
  for (const auto& [slot, index] : {std::pair{0, 0}, {1, 1}, {2, 2}, {2, 5}})
    EXPECT_EQ(world.Entry(slot, index).token, 0);
  ops().UpdateTokenBiases(world.state, Owned(DType::kI32, {0, 4}));
}

TEST_F(StepsTest, ChunksDecodesAndPadding) {
  StepWorld world(4, 2, 50, true);
  world.length.Set({0, 30, 0, 9});
  world.last_token.Set({0, 41, 0, 43});
  world.drafts.Set({0, 0, 42, 43, 0, 0, 44, 45});
  Step step({{2, 10, {5, 6, 5}, 0, Entering(12)}, {1, -1, {}, 3, {}}, {-1, 0, {1, 2}, 0, {}}, {3, -1, {}, 1, {}}}, 2);
  Begin(world, step);
  EXPECT_EQ(Step::Ints(step.row_tokens), (Ints{5, 6, 5, 41, 42, 43, 0, 0, 43, 0, 0}));
  EXPECT_EQ(Step::Ints(step.positions), (Ints{10, 11, 12, 30, 31, 32, 0, 0, 9, 0, 0}));
  EXPECT_EQ(Step::Ints(step.row_slots), (Ints{2, 2, 2, 1, 1, 1, -1, -1, 3, -1, -1}));
  EXPECT_EQ(Step::Ints(world.length), (Ints{0, 33, 13, 10}));
  // Slot 2: positions 10 and 11 are prompt, 12 is generated.
  EXPECT_EQ(world.Count(2, 5), 0x8001);
  EXPECT_EQ(world.Count(2, 6), 0x8000);
  EXPECT_EQ(world.Count(1, 42), 1);
  EXPECT_EQ(world.Count(3, 43), 1);
  EXPECT_EQ(world.Count(0, 0), 0) << "padding counted";
}

TEST_F(StepsTest, EnteringForgetsThePast) {
  StepWorld world(2, 0, 50, true);
  Step first({{1, 0, {5, 5, 7}, 0, Entering(2)}});
  Begin(world, first);
  EXPECT_EQ(world.Count(1, 7), 1);
  Step again({{1, 0, {8}, 0, Entering(1)}});
  Begin(world, again);
  EXPECT_EQ(world.Count(1, 5), 0);
  EXPECT_EQ(world.Count(1, 7), 0);
  EXPECT_EQ(world.Count(1, 8), 0x8000);
  EXPECT_EQ(world.Length(1), 1);
  // The next chunk does not enter again: parameters and counts stay.
  Step next({{1, 1, {8, 9}, 0, {}}});
  Begin(world, next);
  EXPECT_EQ(world.Count(1, 8), 0x8001);
  EXPECT_EQ(world.Length(1), 3);
}

// Tokens that the cache had already count as if they had been fed, also several times, beside those that are.
TEST_F(StepsTest, CountTokens) {
  StepWorld fed(2, 0, 50, true), counted(2, 0, 50, true);
  Step all({{1, 0, {5, 5, 7, 8, 8, 5}, 0, Entering(4)}});
  Begin(fed, all);
  Step rest({{1, 3, {8, 8, 5}, 0, Entering(4)}});
  Begin(counted, rest);
  Owned tokens(DType::kI32, {4, 3});
  ops().CountTokens(counted.state, tokens.Set({1, 5, 0, 1, 5, 0, -1, 9, 1, 1, 7, 0}));
  for (int token = 0; token < 50; ++token) {
    EXPECT_EQ(counted.Count(1, token), fed.Count(1, token)) << token;
    EXPECT_EQ(counted.Count(0, token), 0);
  }
  EXPECT_EQ(fed.Count(1, 5), 0x8001);
  Owned generated(DType::kI32, {70, 3});
  std::vector<int32_t> values;
  for (int i = 0; i < 70; ++i) values.insert(values.end(), {0, 8 + i % 2, 1});
  ops().CountTokens(counted.state, generated.Set(values));
  EXPECT_EQ(counted.Count(0, 8), 35);
  EXPECT_EQ(counted.Count(0, 9), 35);
  EXPECT_EQ(counted.Count(1, 8), fed.Count(1, 8));
  ops().CountTokens(counted.state, Owned(DType::kI32, {0, 3}));
}

// Prefill, then decodes whose drafts are all right, half right and all wrong; counts and length follow what counts.
TEST_F(StepsTest, DraftsAreVerifiedAndForgotten) {
  StepWorld world(2, 2, 50, true);
  Step prefill({{1, 0, {3, 4}, 0, Entering(2)}, {0, 0, {9}, 0, Entering(5), false}});
  Begin(world, prefill);
  Sample(world, prefill, {10}, 50);
  EXPECT_EQ(Step::Ints(prefill.num_accepted), (Ints{1, 0}));
  EXPECT_EQ(world.Last(1), 10);
  EXPECT_EQ(world.Length(1), 2);

  const auto decode = [&](const Ints& drafts, const Ints& sampled, int32_t accepted) {
    const int32_t length = world.Length(1);
    world.drafts.Set({0, 0, drafts[0], drafts[1]});
    Step step({{1, -1, {}, 3, {}}, {-1, -1, {}, 0, {}}});
    Begin(world, step);
    EXPECT_EQ(world.Length(1), length + 3);
    Sample(world, step, sampled, 50);
    EXPECT_EQ(Step::Ints(step.num_accepted), (Ints{1 + accepted, 0}));
    EXPECT_EQ(Step::Ints(step.out_tokens), sampled);
    EXPECT_EQ(world.Last(1), sampled[accepted]);
    EXPECT_EQ(world.Length(1), length + 1 + accepted);
  };
  decode({11, 12}, {11, 12, 13}, 2);  // cache: 10 11 12, last 13
  decode({14, 15}, {14, 20, 21}, 1);  // cache: .. 13 14, last 20
  decode({30, 20}, {22, 31, 32}, 0);  // cache: .. 20, last 22; NOTE: 20 is both last token and a rejected draft
  Ints counts;
  for (int token : {10, 11, 12, 13, 14, 15, 20, 22, 30}) counts.push_back(world.Count(1, token));
  EXPECT_EQ(counts, (Ints{1, 1, 1, 1, 1, 0, 1, 0, 0}));
  EXPECT_EQ(world.Count(1, 3), 0x8000);
}

// A draft that is right only after a wrong one does not count.
TEST_F(StepsTest, AcceptanceStopsAtTheFirstDifference) {
  StepWorld world(1, 2, 50, false);
  world.last_token.Set({1});
  world.length.Set({5});
  world.drafts.Set({7, 8});
  Step step({{0, -1, {}, 3, {}}});
  Begin(world, step);
  Sample(world, step, {6, 8, 9}, 50);
  EXPECT_EQ(Step::Ints(step.num_accepted), Ints{1});
  EXPECT_EQ(world.Length(0), 6);
  EXPECT_EQ(world.Last(0), 6);
}

TEST_F(StepsTest, ScoredRowsSampleNothing) {
  StepWorld world(1, 0, 50, false);
  world.last_token.Set({33});
  Step step({{0, 0, {1, 2, 3}, 0, Entering(3), false}});
  step.SetLogitRows({0, 1, -1}, {0, 0, 0}, {2, 3, -1});
  Begin(world, step);
  Sample(world, step, {40, 41, 42}, 50);
  EXPECT_EQ(Step::Ints(step.num_accepted), Ints{0});
  EXPECT_EQ(Step::Ints(step.out_tokens), (Ints{2, 3, 0}));
  EXPECT_EQ(world.Last(0), 33);
}

// Prompt scores and a sampled token of one sequence in one step.
TEST_F(StepsTest, ScoresAndSamplesTogether) {
  StepWorld world(1, 0, 50, false);
  Step step({{0, 0, {1, 2, 3}, 0, Entering(3)}});
  step.SetLogitRows({0, 1, 2}, {0, 0, 0}, {2, 3, -1});
  Begin(world, step);
  Sample(world, step, {40, 41, 42}, 50);
  EXPECT_EQ(Step::Ints(step.num_accepted), Ints{1});
  EXPECT_EQ(Step::Ints(step.out_tokens), (Ints{2, 3, 42}));
  EXPECT_EQ(world.Last(0), 42);
}

TEST_F(StepsTest, EmptyStep) {
  StepWorld world(1, 0, 50, true);
  Step step(std::vector<testing::StepSequence>{});
  Begin(world, step);
  Sample(world, step, {}, 50);
}

}  // namespace
}  // namespace cachalot
