// Rank: one device, the model on it, its scheduler and cache, and the thread that runs steps.
#ifndef CACHALOT_ENGINE_RANK_H_
#define CACHALOT_ENGINE_RANK_H_

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/memory_plan.h"
#include "engine/model/runner.h"
#include "engine/options.h"
#include "engine/schedule/scheduler.h"
#include "engine/stats.h"
#include "engine/step_agreement.h"
#include "engine/step_shapes.h"
#include "engine/step_watch.h"

namespace cachalot {

// The one checkpoint of a process, opened and checked, and what its ranks must know of it. Outlives them.
struct ServedModel {
  ModelConfig config;
  std::unique_ptr<Checkpoint> checkpoint;
  std::vector<int> eos_token_ids;
  int num_valid_tokens = 0;  // ids from here on are never sampled
};

// What ties a rank to those that it shares experts with: a mesh of step threads, and one of devices. Null: it is alone.
struct RankLinks {
  Mesh *steps = nullptr, *experts = nullptr;
  int num_local = 1;  // ranks of this process, whose numbers follow each other
  int node_of(int rank) const { return rank / num_local; }
  int rank() const { return steps == nullptr ? 0 : steps->rank(); }
  int num_ranks() const { return steps == nullptr ? 1 : steps->num_ranks(); }
};

// Ranks that share experts run every step together, one without work too: before each they agree that somebody has any.
// When one dies or leaves, all do.
//
// Methods may be called from any thread once Start has returned, except where noted.
class Rank {
 public:
  // Gets all that sequences produced, in order; called by the step thread, and leaves `deltas` empty.
  using Output = std::function<void(Scheduler::Deltas* deltas)>;

  // Makes the backend, loads the weights, makes the cache and every workspace, and runs a real step or two; as
  // Engine::Create in what it returns. `options` were validated; `model` and the links must outlive the rank. All ranks
  // at the same time, each in a thread of its own.
  static absl::StatusOr<std::unique_ptr<Rank>> Create(const EngineOptions& options, const ServedModel& model,
                                                      RankLinks links = {});
  ~Rank();
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  void Start(Output output);  // once
  // What is in flight ends with kError (Unavailable); no output comes after it has returned. NOTE: does not free the
  // device's memory, which may hang where the device does.
  void Stop();
  void BeginStop();  // likewise, and does not wait

  // Unavailable when stopping or dead: nothing comes for the sequence then.
  absl::Status Submit(std::unique_ptr<Sequence> sequence);
  void Cancel(RequestId id);  // unknown ids are ignored
  void ResetPrefixCache();

  EngineStats stats() const;  // as of the last step, and what waits to be taken
  absl::Status health() const;

  // Constants from Create on.
  std::string backend_name() const { return backend_->name(); }
  int max_model_len() const { return plan_.max_model_len; }
  int kv_cache_tokens() const { return plan_.num_blocks * kBlockTokens; }
  int64_t kv_bytes_per_token() const { return plan_.block_bytes / kBlockTokens; }

 private:
  Rank(const EngineOptions& options, const ServedModel& model, RankLinks links);

  absl::StatusOr<MemoryDemand> ChooseBackend();
  absl::Status Load();
  absl::Status WarmUp();
  void RunSteps();
  bool TakeInbox(bool may_sleep, Scheduler::Deltas* deltas);
  absl::StatusOr<StepVote> Agree(const StepPlan& plan, bool is_leaving);
  bool IsAwaited() const { return agreement_.has_value() && num_votes_begun_ > agreement_->num_votes(); }
  void Launch(const StepPlan& plan, const StepVote& agreed);
  void AbortOthers(const absl::Status& status);
  absl::StatusOr<StepResult> WaitForStep(Scheduler::Deltas* deltas);
  void Publish(Scheduler::Deltas* deltas);

  EngineOptions options_;  // max_batch_tokens: once the backend is known
  const ServedModel& model_;
  const RankLinks links_;
  MemoryPlan plan_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<StepShapes> shapes_;
  std::unique_ptr<Runner> runner_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<Scheduler> scheduler_;
  std::optional<StepWatch> watch_;
  std::optional<StepAgreement> agreement_;  // none where it is alone
  Output output_;

  // Submit queue: any thread -> step thread.
  mutable std::mutex inbox_mutex_;
  std::condition_variable inbox_filled_;
  std::vector<std::unique_ptr<Sequence>> new_sequences_;
  std::vector<RequestId> cancelled_;
  bool is_stopping_ = false, wants_reset_ = false;
  uint64_t num_votes_begun_ = 0;  // by any rank, as far as this one was told
  EngineStats stats_;             // as of the last step
  absl::Status health_;

  absl::Duration host_time_;  // of the step thread: EngineStats::host_seconds
  std::thread step_thread_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_RANK_H_
