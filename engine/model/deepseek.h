// DeepSeek: the model. Weights and cache in, logits out; every line of its forward pass is a verb of kernels/ops.h.
#ifndef CACHALOT_ENGINE_MODEL_DEEPSEEK_H_
#define CACHALOT_ENGINE_MODEL_DEEPSEEK_H_

#include <memory>

#include "absl/status/statusor.h"
#include "engine/model/activations.h"
#include "engine/model/kv_store.h"
#include "engine/model/weights.h"
#include "kernels/backend.h"

namespace cachalot {

// A step as the operations see it: device arrays at fixed addresses, cut to the step's shape.
struct StepArrays {
  StepInput input;
  StepRows rows;  // [T]
  SlotState state;
};

class DeepSeek {
 public:
  // The cache and the backend must outlive it. `rope` has a row more than there are positions: the first is for the
  // position before 0, and may hold anything finite. ResourceExhausted when the activations do not fit.
  static absl::StatusOr<std::unique_ptr<DeepSeek>> Create(const ModelConfig& config, ModelWeights weights,
                                                          const KvStore& cache, RopeTable rope, Backend& backend,
                                                          const OpLimits& limits, ActivationFormat format,
                                                          const RankExperts& experts);
  // What the tables of experts take of the device's memory.
  static int64_t ExpertTableBytes(const RankExperts& experts);

  // Queues the forward pass of the step's T rows; what Head and FeedMtp read stays until the next. Called in a step's
  // body.
  void Forward(const StepArrays& step);
  // The logits of some of those rows, at most OpLimits::max_rows: [L,W] f32, until the next call.
  Tensor Head(const StepArrays& step, const Tensor& row_token);  // [L]

  // ---- With an MTP layer (mtp.cc).
  // After Forward of the same step: puts its rows into the MTP layer's cache.
  void FeedMtp(const StepArrays& step);
  // After Sample: keeps the outputs of the step's rows that drafting and later steps go on from.
  void KeepBorders(const StepArrays& step);
  // The MTP layer's own forward pass, its cache written too: Head is then what it predicts to follow each row's token.
  // `previous` [T,D]: the main model's output one position before each row, or the layer's own.
  void ForwardMtp(const StepArrays& step, const Tensor& previous);
  // Of rows of different sequences, out of the borders.
  Tensor PreviousOutputs(const StepArrays& step);
  // All that comes after Sample: tokens proposed to follow the last one of every sequence that has sampled, the first
  // `num_drafts` of [S,X]. More than one recycles the layer: its own output stands for the main model's. `drafts` has
  // room for S rows.
  void Draft(const StepArrays& step, const Tensor& num_accepted, const StepArrays& drafts, const Tensor& proposed,
             int num_drafts, int num_valid_tokens);

 private:
  DeepSeek(const ModelConfig& config, ModelWeights weights, const KvStore& cache, RopeTable rope, Backend& backend)
      : config_(config),
        weights_(std::move(weights)),
        cache_(cache),
        rope_{rope.cos_sin.Rows(1, rope.cos_sin.dim(0) - 1)},
        mtp_rope_{rope.cos_sin.Rows(0, rope.cos_sin.dim(0) - 1)},
        ops_(backend.ops()),
        communicator_(backend.communicator()) {}

  // Where a layer's attention finds its keys: their cache, the angle of every position, the first that there is.
  struct Keys {
    const KvCache& cache;
    const RopeTable& rope;
    int first;
  };
  Activations View(const StepArrays& step, int64_t num_logits = 0) const;
  float eps() const { return static_cast<float>(config_.rms_norm_eps); }
  void Layer(const Activations& a, const LayerWeights& w, const ExpertTable& experts, const Keys& keys,
             const Tensor& delta, const StepArrays& step);
  void Attention(const Activations& a, const LayerWeights& w, const Keys& keys, const StepArrays& step);
  void Mlp(const Tensor& out, const Activations& a, const LayerWeights& w);
  void Moe(const Activations& a, const LayerWeights& w, const ExpertTable& experts, const StepArrays& step);
  ExpertTable Experts(int layer) const;  // num_hidden_layers: the MTP layer's
  absl::Status MakeExpertTables(const RankExperts& experts, Device& device);
  void EmbedMtp(const Activations& a, const Tensor& previous, const StepArrays& step);

  const ModelConfig config_;
  const ModelWeights weights_;
  const KvStore& cache_;
  const RopeTable rope_, mtp_rope_;  // of a position, and of the one before it
  Ops& ops_;
  Communicator& communicator_;
  std::unique_ptr<ActivationBuffers> buffers_;
  Buffer expert_slots_buffer_;
  Tensor expert_slots_;  // [layers,E,1+C] i32: ExpertTable; empty without experts
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_DEEPSEEK_H_
