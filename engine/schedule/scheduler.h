// Scheduler: continuous batching. Decides what every step runs and what its result means for each sequence.
#ifndef CACHALOT_ENGINE_SCHEDULE_SCHEDULER_H_
#define CACHALOT_ENGINE_SCHEDULE_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "engine/schedule/block_pool.h"
#include "engine/schedule/sequence.h"
#include "engine/schedule/step.h"

namespace cachalot {

struct SchedulerLimits {
  int max_batch_tokens = 0;  // rows of a step
  int max_sequences = 0;     // slots
  int max_logits_rows = 0;   // more than max_sequences
  int max_model_len = 0;     // its blocks must fit the pool
  std::vector<int> eos_token_ids;
};

// One thread: the step thread. Decode rows come first, then chunks of prompts under way, then new sequences, all in
// the order of (priority, arrival). When blocks run out the last of that order is preempted and recomputed later; the
// first is never, so somebody always advances.
class Scheduler {
 public:
  using Deltas = std::vector<std::pair<RequestId, Delta>>;

  Scheduler(SchedulerLimits limits, BlockPool* pool);

  // Queues a validated sequence; ids grow with arrival.
  void Add(std::unique_ptr<Sequence> sequence);

  // Ends the sequence with kCancelled if it has not ended. Its slot and blocks return once no step in flight names it.
  void Cancel(RequestId id, Deltas* deltas);

  // The next step, empty when nothing can run now. Whatever it returns, unless empty, must be launched.
  StepPlan Plan();

  // Takes the result of the oldest planned step that has not been committed.
  void Commit(const StepResult& result, Deltas* deltas);

  // Ends everything with kError.
  void Fail(const absl::Status& status, Deltas* deltas);

  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  int num_in_flight() const { return static_cast<int>(in_flight_.size()); }
  uint64_t num_steps() const { return next_step_ - 1; }
  uint64_t num_prompt_tokens() const { return num_prompt_tokens_; }  // prefilled, recomputed ones included
  uint64_t num_preemptions() const { return num_preemptions_; }

 private:
  using Order = std::pair<int, RequestId>;  // (priority, arrival): first is served first, last is preempted first
  struct InFlight {
    std::vector<Sequence*> sequences;  // parallel to the plan's
    std::vector<LogitsRow> rows;
    uint64_t step;
  };

  void PlanDecode(StepPlan* plan, InFlight* record);
  void PlanPrefill(StepPlan* plan, InFlight* record);
  void Admit(StepPlan* plan, InFlight* record);
  bool AddChunk(Sequence* sequence, StepPlan* plan, InFlight* record);
  void AddRows(Sequence* sequence, SequenceStep step, StepPlan* plan, InFlight* record);
  bool ReserveBlocks(Sequence* sequence, int num_tokens, StepPlan* plan);
  void PreemptLast();
  bool ReleaseEnded();
  void CommitRows(const StepResult& result, const InFlight& record, size_t row, size_t end, int num_accepted,
                  Sequence* sequence, Delta* delta);
  void AppendToken(Sequence* sequence, int32_t token, Delta* delta) const;
  static Order OrderOf(const Sequence& s) { return {s.priority, s.id}; }

  const SchedulerLimits limits_;
  BlockPool* const pool_;
  std::map<Order, std::unique_ptr<Sequence>> waiting_, running_;
  absl::flat_hash_map<RequestId, Sequence*> by_id_;
  std::deque<InFlight> in_flight_;
  std::vector<int> free_slots_;
  uint64_t next_step_ = 1, num_prompt_tokens_ = 0, num_preemptions_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_SCHEDULER_H_
