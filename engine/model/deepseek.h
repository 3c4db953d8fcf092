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
  // The cache and the backend must outlive it. ResourceExhausted when the activations do not fit.
  static absl::StatusOr<std::unique_ptr<DeepSeek>> Create(const ModelConfig& config, ModelWeights weights,
                                                          const KvStore& cache, RopeTable rope, Backend& backend,
                                                          const OpLimits& limits, ActivationFormat format);

  // Queues the forward pass of the step's T rows, up to the logits of its L rows. Called in a step's body.
  void Forward(const StepArrays& step);
  // Where Forward left them: [L,W] f32.
  Tensor Logits(const StepArrays& step) const;

 private:
  DeepSeek(const ModelConfig& config, ModelWeights weights, const KvStore& cache, RopeTable rope, Backend& backend)
      : config_(config),
        weights_(std::move(weights)),
        cache_(cache),
        rope_(rope),
        ops_(backend.ops()),
        communicator_(backend.communicator()) {}

  void Attention(const Activations& a, const LayerWeights& w, const KvCache& cache, const StepArrays& step);
  void Mlp(const Tensor& out, const Activations& a, const LayerWeights& w);
  void Moe(const Activations& a, const LayerWeights& w, const StepArrays& step);

  const ModelConfig config_;
  const ModelWeights weights_;
  const KvStore& cache_;
  const RopeTable rope_;
  Ops& ops_;
  Communicator& communicator_;
  std::unique_ptr<ActivationBuffers> buffers_;
  Buffer expert_slots_buffer_;
  Tensor expert_slots_;  // [E] i32 logical expert -> physical slot
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_DEEPSEEK_H_
