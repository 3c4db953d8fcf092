// StepShapes: which sizes steps run at, so that few graphs serve all decode steps.
#ifndef CACHALOT_ENGINE_STEP_SHAPES_H_
#define CACHALOT_ENGINE_STEP_SHAPES_H_

#include <vector>

#include "engine/schedule/step.h"
#include "kernels/device.h"

namespace cachalot {

class StepShapes {
 public:
  // A prompt's chunk of so many rows is long (LongChunks). Measured on an H200 at V3's dimensions: from here on to make
  // keys and values of all that it sees costs no more than to absorb its queries, however long its context is.
  static constexpr int kLongChunkRows = 128;

  // `device` must outlive it; its buckets are what sizes are rounded to, as far as the limits let them.
  StepShapes(const OpLimits& limits, const Device& device, bool adapts_drafts = false)
      : limits_(limits), device_(device), adapts_drafts_(adapts_drafts) {}

  // The smallest that has room for the plan.
  StepShape Of(const StepPlan& plan) const;

  // Of a step that nobody here has work for: a row of padding.
  StepShape Padding(int num_proposed) const;

  // Every shape of steps that only decode and propose as many drafts as they verify, by rising size: max_drafts of a
  // sequence; where drafts adapt, also fewer.
  std::vector<StepShape> Decode() const;

 private:
  int Padded(int n, int limit) const;
  int MaxSequences(int rows_per_sequence) const;

  const OpLimits limits_;
  const Device& device_;
  const bool adapts_drafts_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_STEP_SHAPES_H_
