// Activations: every intermediate tensor of the forward pass, made once for the largest step and viewed per step.
#ifndef CACHALOT_ENGINE_MODEL_ACTIVATIONS_H_
#define CACHALOT_ENGINE_MODEL_ACTIVATIONS_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "kernels/backend.h"

namespace cachalot {

// Dimension letters as in kernels/ops.h; F is the MLP's width of the layer at hand.
struct Activations {
  Tensor h;                        // [T,D] residual
  Activation x;                    // [T,D] normed, as the layers' products take it
  Tensor plain;                    // [T,D] normed, unquantised, for the router; empty where x is unquantised itself
  Tensor q_kv_a;                   // [T,Q+C+R], or [T,H*(N+R)+C+R] without q_lora_rank
  Activation q_latent;             // [T,Q]
  Tensor q;                        // [T,H*(N+R)]
  Activation attention;            // [T,H*V]
  Tensor delta;                    // [T,D] what a sublayer adds to the residual
  Tensor gate_up;                  // [T,2F] dense MLP or shared experts
  Activation intermediate;         // [T,F]
  Tensor shared;                   // [T,D]
  Tensor topk_slots;               // [T,K] i32
  Tensor topk_weights;             // [T,K] f32
  ExpertRows expert_rows;          // [M,D]; M = T*K of all ranks, or OpLimits::max_expert_rows
  Tensor expert_gate_up;           // [M,2F]
  Activation expert_intermediate;  // [M,F]
  Tensor expert_out;               // [M,D]
  Activation normed;               // [T,D] after the final norm, unquantised
  Activation head_in;              // [L,D]
  Tensor logits;                   // [L,W] f32
  // Of an MTP layer; empty where there are no drafts.
  Tensor previous;  // [T,D] what the main model put out one position before
  Activation eh;    // [T,2D] normed: the row's token, embedded, and `previous`
};

class ActivationBuffers {
 public:
  // ResourceExhausted when they do not fit.
  static absl::StatusOr<std::unique_ptr<ActivationBuffers>> Create(const ModelConfig& config, Backend& backend,
                                                                   const OpLimits& limits, ActivationFormat format);
  // Device memory that Create allocates; `value_dtype`: the backend's.
  static int64_t Bytes(const ModelConfig& config, DType value_dtype, const OpLimits& limits, ActivationFormat format);

  // Views for a step of T rows and L logits rows; their addresses depend on nothing.
  Activations View(int num_tokens, int num_rows) const;

 private:
  ActivationBuffers(Device* device, const OpLimits& limits) : device_(device), limits_(limits) {}

  void MakeAll(const ModelConfig& config, DType value, ActivationFormat format);
  Tensor NewTensor(DType dtype, int64_t rows, int64_t cols);
  Activation NewActivation(ActivationFormat format, int64_t rows, int64_t cols);

  Device* const device_;  // null: nothing is allocated, only counted
  const OpLimits limits_;
  Activations full_;  // at the maxima
  std::vector<Buffer> buffers_;
  int64_t bytes_ = 0;
  absl::Status status_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_ACTIVATIONS_H_
