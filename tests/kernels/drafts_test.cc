// Verbs of drafting: which of the model's outputs an MTP layer's rows start from.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/kernels/step_world.h"

namespace cachalot {
namespace {

using testing::Owned;

constexpr int64_t kSlots = 3, kBlocks = 7, kWidth = 6;

// Output o of a row is told apart by its first column.
struct DraftsWorld {
  explicit DraftsWorld(DType dtype) : dtype(dtype) {
    table.Set({5, 2, 6, 0, 3, 1, 4, 4, 4});
    length.Set({0, 0, 0});
    state.block_table = table;
    state.length = length;
    for (int64_t b = 0; b < kBlocks; ++b) SetRow(borders, b, -1.0 - static_cast<double>(b));
  }
  void SetRow(Owned& matrix, int64_t t, double value) {
    std::vector<double> values = testing::Values(matrix);
    for (int64_t c = 0; c < kWidth; ++c) values[t * kWidth + c] = value + 0.25 * static_cast<double>(c);
    matrix.Fill(values);
  }
  double First(const Tensor& matrix, int64_t t) const { return testing::Values(matrix.Rows(t, 1))[0]; }

  const DType dtype;
  std::unique_ptr<Backend> backend = testing::MakeTestBackend(testing::CpuOptions());
  Owned table{DType::kI32, {kSlots, 3}}, length{DType::kI32, {kSlots}};
  Owned borders{dtype, {kBlocks, kWidth}};
  SlotState state;
};

struct Rows {
  Rows(const std::vector<int32_t>& slots, const std::vector<int32_t>& positions)
      : slot_rows(DType::kI32, {static_cast<int64_t>(slots.size())}),
        position_rows(DType::kI32, {static_cast<int64_t>(slots.size())}) {
    rows = {Tensor(), position_rows.Set(positions), slot_rows.Set(slots)};
  }
  Owned slot_rows, position_rows;
  StepRows rows;
};

class DraftsTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, DraftsTest, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(DTypeName(info.param)); });

TEST_P(DraftsTest, TheOutputBeforeIsOfTheStepOrOfTheBorder) {
  DraftsWorld world(GetParam());
  // A chunk over a block's border, a sequence that begins, padding, a decode at a block's first position, one within.
  const Rows step({1, 1, 1, 2, 2, -1, 0, -1}, {62, 63, 64, 0, 1, 0, 64, 0});
  Owned hidden(world.dtype, {8, kWidth}), out(world.dtype, {8, kWidth});
  for (int64_t t = 0; t < 8; ++t) world.SetRow(hidden, t, 1.0 + static_cast<double>(t));
  world.backend->ops().PreviousHidden(out, hidden, world.borders, world.state, step.rows);
  const std::vector<double> expected = {-1, 1, 2, 0, 4, 0, -6, 0};  // borders of blocks 0 and 5
  for (int64_t t = 0; t < 8; ++t) EXPECT_EQ(world.First(out, t), expected[t]) << t;
  EXPECT_EQ(testing::Values(out->Rows(3, 1)), std::vector<double>(kWidth, 0.0));
  EXPECT_EQ(testing::Values(out->Rows(6, 1))[kWidth - 1], -6 + 0.25 * (kWidth - 1));

  const Rows single({2, -1, 0}, {130, 0, 63});
  Owned one(world.dtype, {3, kWidth});
  world.backend->ops().PreviousHidden(one, Tensor(), world.borders, world.state, single.rows);
  EXPECT_EQ(world.First(one, 0), -5);
  EXPECT_EQ(world.First(one, 1), 0);
  EXPECT_EQ(world.First(one, 2), -6);
}

TEST_P(DraftsTest, BordersAreOfTheLastPositionThatCounts) {
  DraftsWorld world(GetParam());
  world.length.Set({66, 65, 3});
  // Slot 0: two drafts of four rows were wrong. Slot 1: the first position of a block. Slot 2: all count.
  const Rows step({0, 0, 0, 0, 0, 0, -1, 1, 2, 2}, {62, 63, 64, 65, 66, 67, 0, 64, 1, 2});
  Owned hidden(world.dtype, {10, kWidth});
  for (int64_t t = 0; t < 10; ++t) world.SetRow(hidden, t, 1.0 + static_cast<double>(t));
  world.backend->ops().KeepBorders(world.borders, hidden, world.state, step.rows);
  const std::vector<double> expected = {-1, -2, 4, 8, 10, 2, -7};
  for (int64_t b = 0; b < kBlocks; ++b) EXPECT_EQ(world.First(world.borders, b), expected[b]) << b;
}

// Draws, verifies and drafts with the same made-up logits: row l prefers wanted[l], drafts prefer what comes next.
class DraftingTest : public ::testing::TestWithParam<float> {};
INSTANTIATE_TEST_SUITE_P(Temperatures, DraftingTest, ::testing::Values(0.0f, 0.8f));

TEST_P(DraftingTest, DraftsAreWhatSamplingWouldDraw) {
  constexpr int64_t kVocab = 300, kDrafts = 3;
  const auto backend = testing::MakeTestBackend(testing::CpuOptions());
  Ops& ops = backend->ops();
  testing::Random random(5);
  // Logits of the model at every position and, alike, of an MTP layer that knows as much.
  Owned model(DType::kF32, {16, kVocab});
  model.FillNormal(random, 2.0);

  testing::StepWorld world(3, kDrafts, kVocab, true);
  testing::StepSequence enters{2, 0, {7, 8, 9, 10, 11}, 0, {}, true};
  enters.params.apply = 1;
  enters.params.prompt_tokens = 5;
  enters.params.temperature = GetParam();
  enters.params.top_p = 0.9f;
  enters.params.seed = 77;
  testing::StepSequence padding{-1, -1, {}, 0, {}, false}, chunk{0, 0, {3, 4}, 0, {}, false};
  chunk.params.apply = 1;
  testing::Step first({padding, enters, chunk});
  ops.BeginStep(first.step_rows, world.state, first.input);
  ops.Sample(first.out, world.state, model->Rows(4, 1), Tensor(), first.input, first.step_rows, kVocab);

  const auto ints = [](int64_t n) { return Owned(DType::kI32, {n}); };
  const Owned seq_slot = ints(3), seq_start = ints(3), query_start = ints(4), row_token = ints(3), row_seq = ints(3);
  const Owned row_target = ints(3), tokens = ints(3), positions = ints(3), slots = ints(3);
  const StepInput drafts = {seq_slot, seq_start, query_start, Tensor(), Tensor(), row_token, row_seq, row_target};
  const StepRows rows = {tokens, positions, slots};
  ops.BeginDrafts(rows, drafts, world.state, first.input, first.num_accepted);
  EXPECT_EQ(testing::Step::Ints(slots), (std::vector<int32_t>{-1, 2, -1}));
  EXPECT_EQ(testing::Step::Ints(seq_slot), (std::vector<int32_t>{-1, 2, -1}));
  EXPECT_EQ(testing::Step::Ints(row_token), (std::vector<int32_t>{-1, 1, -1}));
  EXPECT_EQ(testing::Step::Ints(query_start), (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(tokens.data<int32_t>()[1], first.out_tokens.data<int32_t>()[0]);
  EXPECT_EQ(positions.data<int32_t>()[1], 5);

  Owned proposed(DType::kI32, {3, kDrafts});
  for (int i = 0; i < kDrafts; ++i) {
    Owned logits(DType::kF32, {3, kVocab});
    std::memcpy(logits->row<float>(1), model->row<float>(5 + i), kVocab * sizeof(float));
    ops.ProposeDrafts(proposed, rows, world.state, logits, drafts, i, kVocab);
    EXPECT_EQ(positions.data<int32_t>()[1], 6 + i);
    EXPECT_EQ(tokens.data<int32_t>()[1], proposed->row<int32_t>(1)[i]);
    EXPECT_EQ(world.drafts->row<int32_t>(2)[i], proposed->row<int32_t>(1)[i]);
    EXPECT_EQ(proposed->row<int32_t>(0)[i], 0);
    EXPECT_EQ(proposed->row<int32_t>(2)[i], 0);
  }
  EXPECT_EQ(testing::Step::Ints(world.drafts->Rows(0, 1)), std::vector<int32_t>(kDrafts, 0)) << "of a slot without";

  // The next step draws with the model's logits: every draft is right, and one more comes.
  testing::StepSequence decode{2, -1, {}, 1 + kDrafts, {}, true};
  testing::Step second({decode});
  ops.BeginStep(second.step_rows, world.state, second.input);
  ops.Sample(second.out, world.state, model->Rows(5, 1 + kDrafts), Tensor(), second.input, second.step_rows, kVocab);
  EXPECT_EQ(second.num_accepted.data<int32_t>()[0], 1 + kDrafts);
  EXPECT_EQ(world.Length(2), 5 + 1 + kDrafts);
}

}  // namespace
}  // namespace cachalot
