// Scheduler: continuous batching. Decides what every step runs and what its result means for each sequence.
#ifndef CACHALOT_ENGINE_SCHEDULE_SCHEDULER_H_
#define CACHALOT_ENGINE_SCHEDULE_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "engine/schedule/admission.h"
#include "engine/schedule/block_pool.h"
#include "engine/schedule/draft_length.h"
#include "engine/schedule/sequence.h"
#include "engine/schedule/step.h"
#include "engine/stats.h"

namespace cachalot {

struct SchedulerLimits {
  int max_batch_tokens = 0;  // rows of a step
  int max_sequences = 0;     // slots
  int max_model_len = 0;     // its blocks, and those of DraftSlack, must fit the pool
  std::vector<int> eos_token_ids;
  int max_drafts = 0;          // tokens proposed to follow each that is sampled
  bool adapts_drafts = false;  // as many of them as DraftLength says
};

// One thread: the step thread. Time is what the caller says it is.
//
// Who runs is Admission's business: no more than a step has rows. Each decoding sequence has its row and as many drafts
// as leave a row for everybody; what they leave goes to prompts: half to the first in Admission's order, so that it
// cannot starve, half to the others by priority, then to the client's turn, then to the fewest tokens left, so that a
// long prompt holds up no short one and many prompts of one client hold up nobody else's; what either half leaves goes
// to the other. A prompt whose next block another
// is computing waits for it, and shares it.
class Scheduler {
 public:
  using Deltas = std::vector<std::pair<RequestId, Delta>>;

  Scheduler(SchedulerLimits limits, BlockPool* pool);

  // Queues a validated sequence; ids grow with arrival.
  void Add(std::unique_ptr<Sequence> sequence);

  // Ends the sequence with kCancelled if it has not ended. Its slot and blocks return once no step in flight names it.
  void Cancel(RequestId id, absl::Time now, Deltas* deltas);

  // Likewise ends those whose deadline has passed, with kError (DeadlineExceeded).
  void Expire(absl::Time now, Deltas* deltas);

  // The next step, empty when nothing can run now: then, unless steps are in flight, no sequence is left. Whatever it
  // returns, unless empty, must be launched before the next call.
  StepPlan Plan(absl::Time now);

  // The step that was planned last proposes more drafts than its plan says, since other ranks' do: the next verifies
  // them.
  void Proposes(int num_drafts);

  // Takes the result of the oldest planned step that has not been committed.
  void Commit(const StepResult& result, absl::Time now, Deltas* deltas);

  // Ends everything with kError.
  void Fail(const absl::Status& status, absl::Time now, Deltas* deltas);

  // What a step has taken in which so many sequences of a few tokens each decoded with so many drafts, as far as it was
  // measured beforehand.
  void TookBeforehand(int num_sequences, int num_drafts, absl::Duration time) {
    draft_length_.TookBeforehand(num_sequences, num_sequences, num_drafts, time);
  }
  const SchedulerLimits& limits() const { return limits_; }
  int num_in_flight() const { return static_cast<int>(in_flight_.size()); }
  EngineStats stats() const;

 private:
  struct InFlight {
    std::vector<Sequence*> sequences;  // parallel to the plan's
    std::vector<LogitsRow> rows;
    size_t num_sampled = 0;  // of the rows; the rest are scored
    uint64_t step = 0;
    // For DraftLength.
    absl::Time planned;
    int num_decoding = 0, num_drafts = -1;  // of each; -1: they differ, or the step did something else too
    int64_t num_decoding_keys = 0;
  };
  struct RowRange {  // of a result
    size_t begin, end;
  };
  // A step in the making.
  struct NewStep {
    StepPlan plan;
    InFlight record;
    std::vector<LogitsRow> scored;  // goes to the plan's end
    absl::Time now;
    int num_drafts = 0;  // of each sequence that decodes, at most
  };

  void PlanRows(NewStep* next);
  void ChooseDrafts(NewStep* next);
  void PlanDecode(Sequence* sequence, NewStep* next);
  void PlanPrompts(std::vector<Sequence*>* prompts, NewStep* next);
  void PlanChunk(Sequence* sequence, int max_rows, NewStep* next);
  void LeaveOutFollowers(std::vector<Sequence*>* prompts) const;
  void SkipCached(Sequence* sequence);
  bool CountCached(Sequence* sequence, NewStep* next);
  void AddRows(Sequence* sequence, SequenceStep step, NewStep* next);
  void Publish(Sequence* sequence, int num_final);
  bool WantsRows(const Sequence& sequence) const;
  int RowsLeft(const NewStep& next) const { return limits_.max_batch_tokens - next.plan.num_rows; }

  void CommitTokens(const StepResult& result, RowRange rows, int num_accepted, absl::Time now, Sequence* sequence,
                    Delta* delta);
  FinishReason AppendToken(Sequence* sequence, int32_t token, Delta* delta);
  void End(Sequence* sequence, FinishReason reason, absl::Time now, Delta* delta);
  void EndEarly(Sequence* sequence, FinishReason reason, const absl::Status& error, absl::Time now, Deltas* deltas);

  const SchedulerLimits limits_;
  BlockPool* const pool_;
  Admission admission_;
  absl::flat_hash_map<RequestId, Sequence*> by_id_;       // those not over
  std::set<std::pair<absl::Time, RequestId>> deadlines_;  // of those not over, where finite
  std::deque<InFlight> in_flight_;
  DraftLength draft_length_;
  absl::Time last_commit_ = absl::InfinitePast();
  int last_num_drafts_ = -1;  // InFlight::num_drafts of what was committed last
  uint64_t next_step_ = 1;
  EngineStats counters_;  // its gauges are not kept
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_SCHEDULER_H_
