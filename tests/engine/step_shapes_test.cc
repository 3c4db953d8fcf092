// StepShapes: sizes rounded up to what a device makes graphs for, within the limits.
#include "engine/step_shapes.h"

#include <gtest/gtest.h>

#include <bit>

namespace cachalot {
namespace {

// Rounds up to powers of two, as a GPU might; does nothing else.
class RoundingDevice : public Device {
 public:
  absl::StatusOr<Buffer> Allocate(size_t, Memory) override { return absl::UnimplementedError(""); }
  void Upload(const Tensor&, const void*) override {}
  void Download(void*, const Tensor&) override {}
  void Submit(const StepKey&, std::function<void()>) override {}
  Event Record() override { return 0; }
  bool IsComplete(Event) override { return true; }
  absl::Status Wait(Event, absl::Duration) override { return absl::OkStatus(); }
  int Bucket(int n) const override { return static_cast<int>(std::bit_ceil(static_cast<unsigned>(n))); }
  size_t FreeMemory() const override { return 0; }
};

OpLimits Limits(int max_tokens, int max_sequences, int max_drafts) {
  OpLimits limits;
  limits.max_tokens = max_tokens;
  limits.max_sequences = max_sequences;
  limits.max_rows = max_sequences * (1 + max_drafts) + 64;
  limits.max_drafts = max_drafts;
  return limits;
}

StepPlan PlanOf(const std::vector<SequenceStep>& sequences, int num_proposed = 0) {
  StepPlan plan;
  plan.num_proposed = num_proposed;
  for (const SequenceStep& sequence : sequences) {
    const auto index = static_cast<int32_t>(plan.sequences.size());
    for (int i = sequence.start < 0 ? 0 : sequence.num_rows - 1; i < sequence.num_rows; ++i) {
      plan.logits_rows.push_back({plan.num_rows + i, index, -1});
    }
    plan.num_rows += sequence.num_rows;
    plan.sequences.push_back(sequence);
  }
  return plan;
}

SequenceStep Decode(int num_rows) { return {0, -1, num_rows, {}, {}, {}}; }
SequenceStep Chunk(int num_rows) { return {0, 0, num_rows, {}, {}, {}}; }

TEST(StepShapesTest, OnlyDecodingIsRoundedBySequences) {
  const RoundingDevice device;
  const StepShapes shapes(Limits(512, 48, 2), device);
  EXPECT_EQ(shapes.Of(PlanOf(std::vector(5, Decode(1)))), StepShape::Decode(8, 1, 0));
  EXPECT_EQ(shapes.Of(PlanOf(std::vector(5, Decode(3)), 2)), StepShape::Decode(8, 3, 2));
  EXPECT_NE(shapes.Of(PlanOf(std::vector(5, Decode(3)), 1)), StepShape::Decode(8, 3, 2)) << "proposes fewer";
  EXPECT_EQ(StepShape::Decode(8, 3, 2).num_tokens, 24);
  EXPECT_EQ(StepShape::Decode(8, 3, 2).num_rows, 24);
  EXPECT_EQ(shapes.Of(PlanOf(std::vector(40, Decode(1)))), StepShape::Decode(48, 1, 0)) << "no more than the slots";
}

TEST(StepShapesTest, WhateverElseIsMixed) {
  const RoundingDevice device;
  const StepShapes shapes(Limits(512, 48, 1), device);
  constexpr auto kMixed = StepShape::Path::kMixed;
  EXPECT_EQ(shapes.Of(PlanOf({Decode(2), Chunk(30), Decode(2)})), (StepShape{kMixed, 4, 64, 8}));
  EXPECT_EQ(shapes.Of(PlanOf({Decode(2), Decode(1)})), (StepShape{kMixed, 2, 4, 4})) << "rows differ";
  EXPECT_EQ(shapes.Of(PlanOf({Chunk(1)})), (StepShape{kMixed, 1, 1, 1})) << "a prompt of one token";
  EXPECT_EQ(StepShapes(Limits(3, 48, 0), device).Of(PlanOf({Decode(1), Decode(1), Chunk(1)})),
            (StepShape{kMixed, 3, 3, 3}))
      << "no more sequences than rows, nor logits";
  EXPECT_EQ(shapes.Of(PlanOf({Decode(2), Chunk(127)})), (StepShape{kMixed, 2, 256, 4}));
  EXPECT_EQ(shapes.Of(PlanOf({Chunk(400)})), (StepShape{kMixed, 1, 512, 1, {128, 0, 0, 512}})) << "a long chunk";
  EXPECT_EQ(shapes.Of(PlanOf({Decode(2), Chunk(200)})), (StepShape{kMixed, 2, 256, 4, {128, 2, 2, 256}}));
}

// A graph for each shape that a step of decodes alone may have, and no other.
TEST(StepShapesTest, EveryDecodeStepHasItsGraph) {
  const RoundingDevice device;
  for (const OpLimits& limits : {Limits(512, 48, 0), Limits(512, 48, 2), Limits(10, 48, 2), Limits(1, 48, 0)}) {
    const StepShapes shapes(limits, device);
    const std::vector<StepShape> all = shapes.Decode();
    const int rows = 1 + limits.max_drafts, most = std::min(limits.max_sequences, limits.max_tokens / rows);
    std::vector<StepShape> met;
    for (int n = 1; n <= most; ++n) {
      const StepShape shape = shapes.Of(PlanOf(std::vector(n, Decode(rows)), limits.max_drafts));
      EXPECT_GE(shape.num_sequences, n);
      EXPECT_LE(shape.num_tokens, limits.max_tokens);
      if (met.empty() || met.back() != shape) met.push_back(shape);
    }
    EXPECT_EQ(met, all) << most;
  }
}

}  // namespace
}  // namespace cachalot
