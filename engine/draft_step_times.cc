// Schedulers of their own, of a fixed number of drafts each, and what lies between two of their commits.
#include "engine/draft_step_times.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"

namespace cachalot {
namespace {

constexpr int kSteps = 3;  // at least, that decode: two of them end after another that did nothing else
constexpr absl::Duration kLongestStep = absl::Minutes(1);

int MostTokens(int num_drafts) { return 1 + kSteps * (1 + num_drafts); }

// The least time of a step in which `num_sequences` decode with `num_drafts` each; infinite where there was none.
absl::StatusOr<absl::Duration> StepTime(const StepShapes& shapes, int num_sequences, int num_drafts, Runner* runner,
                                        BlockPool* pool, SchedulerLimits limits) {
  limits.max_drafts = num_drafts;
  limits.adapts_drafts = false;
  Scheduler scheduler(limits, pool);
  for (int i = 0; i < num_sequences; ++i) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = static_cast<RequestId>(i) + 1;
    sequence->tokens = {0};
    sequence->num_prompt_tokens = 1;
    sequence->sampling.max_tokens = MostTokens(num_drafts);
    sequence->sampling.ignore_eos = true;
    scheduler.Add(std::move(sequence));
  }
  absl::Duration least = absl::InfiniteDuration();
  std::deque<bool> are_alike;  // of steps in flight: all sequences decode, with all drafts
  bool was_alike = false;
  absl::Time last_commit = absl::Now();
  while (true) {
    const StepPlan plan = scheduler.Plan(absl::Now());
    if (!plan.empty()) {
      are_alike.push_back(static_cast<int>(plan.sequences.size()) == num_sequences &&
                          plan.rows_per_sequence() == 1 + num_drafts);
      runner->Launch(plan, shapes.Of(plan));
    }
    if (scheduler.num_in_flight() == 0) return least;
    if (scheduler.num_in_flight() < kMaxStepsInFlight && !plan.empty()) continue;
    const auto result = runner->Wait(kLongestStep);
    if (!result.ok()) return result.status();
    const absl::Time now = absl::Now();
    if (was_alike && are_alike.front()) least = std::min(least, now - last_commit);
    was_alike = are_alike.front();
    are_alike.pop_front();
    last_commit = now;
    Scheduler::Deltas deltas;
    scheduler.Commit(*result, now, &deltas);
  }
}

}  // namespace

absl::Status MeasureDraftSteps(const StepShapes& shapes, absl::Duration budget, Runner* runner, BlockPool* pool,
                               Scheduler* scheduler) {
  const SchedulerLimits& limits = scheduler->limits();
  const absl::Time end = absl::Now() + budget;
  if (limits.max_model_len < 2 + MostTokens(limits.max_drafts)) return absl::OkStatus();
  for (int num_sequences = 1; num_sequences <= limits.max_sequences; num_sequences *= 2) {
    for (int k = 0; k <= limits.max_drafts && num_sequences * (1 + k) <= limits.max_batch_tokens; ++k) {
      if (absl::Now() > end) return absl::OkStatus();
      const auto time = StepTime(shapes, num_sequences, k, runner, pool, limits);
      if (!time.ok()) return time.status();
      if (*time < absl::InfiniteDuration()) scheduler->TookBeforehand(num_sequences, k, *time);
    }
  }
  return absl::OkStatus();
}

}  // namespace cachalot
