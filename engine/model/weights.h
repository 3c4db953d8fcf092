// ModelWeights: what this rank holds of a checkpoint, prepared by the backend. Members are named like the checkpoint.
#ifndef CACHALOT_ENGINE_MODEL_WEIGHTS_H_
#define CACHALOT_ENGINE_MODEL_WEIGHTS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/safetensors.h"
#include "kernels/ops.h"

namespace cachalot {

using WeightPtr = std::unique_ptr<Weight>;

// One decoder layer; dimension letters as in kernels/ops.h.
struct LayerWeights {
  WeightPtr input_layernorm, post_attention_layernorm;  // [D]
  // q_a_proj ‖ kv_a_proj_with_mqa [Q+C+R, D], or q_proj ‖ kv_a_proj_with_mqa [H*(N+R)+C+R, D] without q_lora_rank
  WeightPtr q_kv_a_proj;
  WeightPtr q_a_layernorm;   // [Q], null without q_lora_rank
  WeightPtr q_b_proj;        // [H*(N+R), Q], null without q_lora_rank
  WeightPtr kv_a_layernorm;  // [C]
  WeightPtr kv_b_proj;       // W_UK, W_UV: [H*(N+V), C]
  WeightPtr o_proj;          // [D, H*V]
  // Dense layers: the MLP. MoE layers: the shared experts, one fused MLP (null when n_shared_experts is 0).
  WeightPtr gate_up_proj;  // gate_proj ‖ up_proj [2F, D]
  WeightPtr down_proj;     // [D, F]
  // MoE layers only.
  WeightPtr gate;                     // [E, D]
  WeightPtr e_score_correction_bias;  // [E] f32, null for V2's rules
  WeightPtr experts_gate_up_proj;     // G of [2F, D]
  WeightPtr experts_down_proj;        // G of [D, F]
};

// The first MTP layer (report 2.2). It embeds and predicts with the main model's embed_tokens and lm_head: a
// checkpoint's copies of them are not loaded.
struct MtpWeights {
  WeightPtr enorm, hnorm;  // [D]
  WeightPtr eh_proj;       // [D, 2D], columns of the embedding first
  LayerWeights layer;
  WeightPtr shared_head_norm;  // [D]
};

// The routed experts that a rank holds: its slot g of a layer has expert list[g]. One may be there twice.
using ExpertList = std::vector<int>;

// What a rank knows of routed experts (engine/expert_placement.h), of each layer of the checkpoint: num_hidden_layers
// and the MTP layer's. Dense layers are there too, and not looked at.
struct RankExperts {
  std::vector<ExpertList> held;  // G in each layer
  int num_copies = 1;            // C
  std::vector<int32_t> slots;    // [layers, E, 1+C]: ExpertTable::slots of each
};

struct ModelWeights {
  WeightPtr embed_tokens;  // [W, D]
  WeightPtr norm;          // [D]
  WeightPtr lm_head;       // [W, D]
  std::vector<LayerWeights> layers;
  std::unique_ptr<MtpWeights> mtp;            // null where it was not asked for
  std::vector<std::vector<float>> converted;  // e_score_correction_biases that are not stored as f32: owned here

  // Every tensor the model needs is there, has the shape the config says and a known dtype, FP8 weights have their
  // scales, scales are finite and positive; nothing is there that contradicts the config (layers beyond it, experts
  // beyond n_routed_experts, a layer's weight or bias without a place in the model). One line each, "FILE: TENSOR:
  // found X, expected Y"; after a thousand, a line that counts the rest. Reads scales, biases and norms only, unless
  // `deep`: then every FP8 and float value is scanned for NaN and infinity. MTP layers are checked when present; their
  // embed_tokens / shared_head.head copies are optional. Tensors that are stacked into one weight must be stored alike.
  static std::vector<std::string> Problems(const ModelConfig& config, const Checkpoint& checkpoint, bool deep);

  // Whether the checkpoint has the first MTP layer.
  static bool HasMtp(const ModelConfig& config, const Checkpoint& checkpoint);

  // InvalidArgument with the first problem. The checkpoint must outlive the weights: stored bytes are not copied where
  // the backend can read them in place. `with_mtp`: HasMtp must be true.
  static absl::StatusOr<ModelWeights> Load(const ModelConfig& config, const Checkpoint& checkpoint,
                                           const RankExperts& experts, bool with_mtp, Ops& ops);
  // What Load would take of the device's memory, by a dry run of it; fails as it would.
  static absl::StatusOr<int64_t> DeviceBytes(const ModelConfig& config, const Checkpoint& checkpoint,
                                             const RankExperts& experts, bool with_mtp, Ops& ops);
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_WEIGHTS_H_
