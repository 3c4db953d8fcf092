// SchedulerDriver: runs a Scheduler against a made-up device and clock, and holds every step to its invariants.
#ifndef CACHALOT_TESTS_ENGINE_SCHEDULER_DRIVER_H_
#define CACHALOT_TESTS_ENGINE_SCHEDULER_DRIVER_H_

#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "engine/schedule/scheduler.h"
#include "tests/engine/fake_device.h"

namespace cachalot {

class SchedulerDriver {
 public:
  struct Options {
    int max_tokens = 16, priority = 0;
    std::string client = {};
    bool scores = false;
    int num_top = -1;        // alternatives of what it generates; of its prompt too, where it scores
    int deadline_turns = 0;  // from now; 0: none
    // The first tokens of its prompt are those of all of its family; it is of a salt, and has penalties or none.
    int family = 0, num_of_family = 0;
    std::string salt = {};
    RequestId continues = 0;  // its prompt begins with the prompt and the tokens of this one, or as many as it has now
    bool has_penalties = false;
  };
  struct Record {
    std::vector<int32_t> prompt, tokens;
    Options options;
    absl::Time submitted, deadline;
    Admission::Order order;
    Context context;                 // of prompt and tokens
    const Sequence* live = nullptr;  // until its end
    int num_scored = 0;
    bool is_cancelled = false;
    FinishReason reason = FinishReason::kNone;
    absl::Status error;
    RequestTimes times;
    int num_cached_tokens = 0;
    int rows = 0;          // in the last step
    int num_unserved = 0;  // steps since it was served, while it ran or was the first of all
  };
  struct Counts {
    uint64_t cancelled = 0, expired = 0, overtakes = 0, prompt_tokens_ended = 0, prompt_tokens = 0;
    uint64_t preferred = 0;  // admitted while one of the same client and priority that stands in front waits on
    uint64_t shared = 0, followed = 0, counted = 0;  // blocks in use twice; prompts that waited for one; tokens
    int longest_decode_wait = 0, longest_prompt_wait = 0, longest_first_wait = 0;  // steps
  };

  SchedulerDriver(SchedulerLimits limits, int num_blocks,
                  BlockPool::PrefixCache prefix_cache = BlockPool::PrefixCache::kOn)
      : limits_(limits), pool_(num_blocks, prefix_cache), scheduler_(limits, &pool_), device_(limits) {}

  RequestId Add(int prompt_length, Options options);
  RequestId Add(std::unique_ptr<Sequence> sequence);  // id, submitted and seed are the driver's
  void Cancel(RequestId id);

  // One turn of the engine's loop, a second long; false when there was nothing to do. It waits for a step when two are
  // in flight; `waits_early`: also when one is.
  bool Turn(bool waits_early = false);
  void Drain(int max_turns);

  // The rows of every request in the step that the last turn launched.
  std::map<RequestId, int> LastRows() const;

  Scheduler& scheduler() { return scheduler_; }
  EngineStats stats() const { return scheduler_.stats(); }
  BlockPool& pool() { return pool_; }
  const Record& record(RequestId id) { return records_.at(id); }
  const Counts& counts() const { return counts_; }
  const StepPlan& last_plan() const { return last_plan_; }

 private:
  struct State {
    bool has_slot, was_preempted;
  };
  using Before = std::map<RequestId, State>;
  bool WantsRows(const Sequence& s) const;
  struct Waiting {
    RequestId id = 0;  // 0: nobody waits
    int num_preemptions = 0;
    friend bool operator==(const Waiting&, const Waiting&) = default;
  };
  Waiting FirstWaiting() const;
  void CheckShape(const StepPlan& plan) const;
  void CheckOwnership(const StepPlan& plan);
  void CheckAdmissions(const Before& before, Waiting first, uint64_t num_preempted);
  void CheckSharing();
  void CheckRows(const StepPlan& plan, bool had_blocks);
  bool Follows(const Sequence& s);
  void CheckWaits(const Before& before);
  void Serve(const StepPlan& plan);
  void Take(const Scheduler::Deltas& deltas);
  void TakeEnd(RequestId id, const Delta& delta);

  const SchedulerLimits limits_;
  BlockPool pool_;
  Scheduler scheduler_;
  FakeDevice device_;
  struct InFlight {
    StepResult result;
    std::set<int> slots;
    std::set<int32_t> blocks;
  };
  std::deque<InFlight> in_flight_;
  std::map<RequestId, Record> records_;
  std::set<Admission::Order> live_;
  StepPlan last_plan_;
  Counts counts_;
  uint64_t num_overtakers_ = 0;  // of the first that waits
  uint64_t num_giving_way_ = 0;  // since it has
  absl::Time now_ = absl::UnixEpoch();
  RequestId next_id_ = 1;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_ENGINE_SCHEDULER_DRIVER_H_
