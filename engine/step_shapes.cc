// Sizes rounded up to the device's buckets.
#include "engine/step_shapes.h"

#include <algorithm>

#include "kernels/check.h"

namespace cachalot {
int StepShapes::Padded(int n, int limit) const { return std::min(device_.Bucket(n), limit); }

int StepShapes::MaxSequences(int rows_per_sequence) const {
  return std::min(limits_.max_sequences, std::min(limits_.max_tokens, limits_.max_rows) / rows_per_sequence);
}

StepShape StepShapes::Of(const StepPlan& plan) const {
  CHECK(!plan.empty());
  const int num_sequences = static_cast<int>(plan.sequences.size());
  const int rows = plan.rows_per_sequence();
  if (rows > 0 && static_cast<int>(plan.logits_rows.size()) == plan.num_rows) {
    return StepShape::Decode(Padded(num_sequences, MaxSequences(rows)), rows, plan.num_proposed);
  }
  LongChunkFinder long_chunks(kLongChunkRows);
  for (const SequenceStep& sequence : plan.sequences) long_chunks.Add(sequence.start, sequence.num_rows);
  return {StepShape::Path::kMixed,
          Padded(num_sequences, MaxSequences(1)),
          Padded(plan.num_rows, limits_.max_tokens),
          Padded(static_cast<int>(plan.logits_rows.size()), limits_.max_tokens),
          long_chunks.found(),
          plan.num_proposed};
}

StepShape StepShapes::Padding(int num_proposed) const {
  const int rows = 1 + num_proposed;
  return StepShape::Decode(Padded(1, MaxSequences(rows)), rows, num_proposed);
}

std::vector<StepShape> StepShapes::Decode() const {
  std::vector<StepShape> shapes;
  for (int num_drafts = adapts_drafts_ ? 0 : limits_.max_drafts; num_drafts <= limits_.max_drafts; ++num_drafts) {
    const int rows = 1 + num_drafts, largest = MaxSequences(rows);
    for (int n = 1; n <= largest; n = device_.Bucket(n) + 1) {
      shapes.push_back(StepShape::Decode(Padded(n, largest), rows, num_drafts));
    }
  }
  return shapes;
}

}  // namespace cachalot
