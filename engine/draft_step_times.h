// What decode steps with drafts take, measured before the first request.
#ifndef CACHALOT_ENGINE_DRAFT_STEP_TIMES_H_
#define CACHALOT_ENGINE_DRAFT_STEP_TIMES_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/model/runner.h"
#include "engine/schedule/block_pool.h"
#include "engine/schedule/scheduler.h"
#include "engine/step_shapes.h"

namespace cachalot {

// Tells `scheduler` what steps of 1, 2, 4, 8, ... sequences take with every number of drafts, as served: while one runs
// the next is planned. Sizes that `budget` does not reach it learns as it serves. Needs an empty pool, and leaves one.
// The device's fault, if there is one.
absl::Status MeasureDraftSteps(const StepShapes& shapes, absl::Duration budget, Runner* runner, BlockPool* pool,
                               Scheduler* scheduler);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_DRAFT_STEP_TIMES_H_
