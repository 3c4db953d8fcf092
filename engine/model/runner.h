// Runner: a step plan becomes device arrays, one upload, the forward pass, sampling, and a result.
#ifndef CACHALOT_ENGINE_MODEL_RUNNER_H_
#define CACHALOT_ENGINE_MODEL_RUNNER_H_

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/deepseek.h"
#include "engine/schedule/step.h"
#include "kernels/backend.h"

namespace cachalot {

struct RunnerOptions {
  OpLimits limits;
  KvOptions kv;
  ActivationFormat format = ActivationFormat::kF32;  // of the layers' activations
  RankExperts experts;
  int num_blocks = 0;
  int num_valid_tokens = 0;  // ids from here on are never sampled
};

// What a step brings back.
struct StepOutput {
  SampleOutput sample;
  Tensor drafts;  // [S,X]
};

// One thread: the rank's step thread. See engine/schedule/step.h for how two steps follow each other.
class Runner {
 public:
  // Loads the weights and makes the cache, the slots and every buffer. The checkpoint and the backend must outlive it.
  static absl::StatusOr<std::unique_ptr<Runner>> Create(const ModelConfig& config, const Checkpoint& checkpoint,
                                                        const RunnerOptions& options, Backend& backend);

  // Device memory that the slots, the tables and a step's input and output take, by a dry run; weights, activations and
  // the cache's blocks not included.
  static int64_t StateBytes(const OpLimits& limits, Backend& backend);

  // Before the first step: has the device make graphs of steps of these shapes, where it replays graphs. What was made,
  // for a log; empty where it does not.
  absl::StatusOr<std::string> Prepare(const std::vector<StepShape>& shapes);

  // Queues the step at a shape that has room for it, an empty one too, and returns. At most kMaxStepsInFlight are
  // launched and not yet waited for.
  void Launch(const StepPlan& plan, const StepShape& shape);

  int num_in_flight() const { return static_cast<int>(pending_.size()); }

  // The oldest launched step's result; DeadlineExceeded, or the device's fault: the rank is dead then.
  absl::StatusOr<StepResult> Wait(absl::Duration timeout);

 private:
  // A step is two submissions, so that something may be uploaded for the second while the first runs.
  struct Submission {
    StepKey key;
    std::function<void()> body;
  };
  struct Pending {
    uint64_t step;
    StepShape shape;
    int num_rows, num_sequences;  // before padding
    bool wants_top;
    int set;
    Device::Event event;
  };

  Runner(const RunnerOptions& options, Backend& backend)
      : options_(options), backend_(backend), device_(backend.device()) {}

  absl::Status FillAngles(const ModelConfig& config);
  absl::Status MakeState();
  absl::Status MakeStaging();
  absl::StatusOr<void*> Allocate(int64_t bytes, Device::Memory memory);
  absl::StatusOr<Tensor> NewTensor(DType dtype, std::initializer_list<int64_t> dims);
  StepInput InputAt(void* base, const StepShape& shape) const;
  StepOutput OutputAt(void* base, const StepShape& shape) const;
  Tensor PackedInput(const StepShape& shape) const;  // the device's input arrays as one run of bytes
  Tensor PackedOutput(const StepShape& shape) const;
  StepArrays ArraysOf(const StepShape& shape) const;
  StepArrays DraftsOf(const StepShape& shape) const;
  Submission Forward(const StepShape& shape, int set);
  Submission Sample(const StepShape& shape, int set);
  void SampleRows(const StepArrays& step, const SampleOutput& output);
  void FillInput(const StepPlan& plan, const StepShape& shape, const StepInput& input) const;
  int64_t max_block_updates() const {
    return int64_t{options_.limits.max_sequences} * ((options_.limits.max_context + kBlockTokens - 1) / kBlockTokens);
  }
  void UploadBlockUpdates(const std::vector<BlockUpdate>& updates, int set);
  void CountTokens(const std::vector<CountedToken>& tokens, int set);
  void UploadTokenBiases(const std::vector<SequenceStep>& sequences, int set);

  const RunnerOptions options_;
  Backend& backend_;
  Device& device_;
  std::vector<Buffer> buffers_;
  bool is_dry_run_ = false;   // allocates nothing
  int64_t device_bytes_ = 0;  // allocated, or in a dry run not
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<DeepSeek> model_;
  SlotState state_;
  StepRows rows_;          // at the maxima
  StepArrays drafts_;      // likewise, of a drafting pass; empty without drafts
  Tensor angles_;          // [1+max_context,R]
  Tensor block_updates_;   // [kBlockUpdatesAtOnce,3]
  Tensor bias_updates_;    // [max,4]
  Tensor counted_tokens_;  // [max_context,3]
  Tensor none_accepted_;   // [U], of rows that do not sample
  Tensor input_, output_;  // device, bytes
  struct StagingSet {
    void *input, *output, *block_updates, *bias_updates, *counted_tokens;  // pinned
  };
  std::array<StagingSet, kMaxStepsInFlight> staging_;
  int next_set_ = 0;
  std::deque<Pending> pending_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_RUNNER_H_
