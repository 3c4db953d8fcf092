// ModelConfig: config.json of the DeepSeek-V3 family, with every spelling of its fields, checked.
#ifndef CACHALOT_ENGINE_MODEL_CONFIG_H_
#define CACHALOT_ENGINE_MODEL_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops_types.h"

namespace cachalot {

// YaRN (arXiv 2309.00071, as DeepSeek-V3 uses it: report 4.3). factor 1 with is_yarn false: plain RoPE.
struct RopeScaling {
  bool is_yarn = false;
  double factor = 1.0;
  int original_max_position_embeddings = 0;
  double beta_fast = 32.0, beta_slow = 1.0;
  double mscale = 1.0, mscale_all_dim = 0.0;
};

// Names are config.json's. Read once, never changed.
struct ModelConfig {
  std::string model_type;
  int vocab_size = 0, hidden_size = 0, intermediate_size = 0, moe_intermediate_size = 0;
  int num_hidden_layers = 0, first_k_dense_replace = 0, num_nextn_predict_layers = 0;
  int num_attention_heads = 0;
  int q_lora_rank = 0;  // 0: null, a single q_proj
  int kv_lora_rank = 0, qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;
  int n_routed_experts = 0, n_shared_experts = 0, num_experts_per_tok = 0, n_group = 1, topk_group = 1;
  std::string scoring_func, topk_method;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1.0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  int max_position_embeddings = 0;
  bool is_fp8 = false;                      // quantization_config: fp8 e4m3, 128x128 blocks
  ScaleRule scale_rule = ScaleRule::kFP32;  // of activations; UE8M0 where scale_fmt says so
  int bos_token_id = -1;
  std::vector<int> eos_token_ids;

  bool is_moe_layer(int layer) const { return n_routed_experts > 0 && layer >= first_k_dense_replace; }
  bool has_correction_bias() const { return topk_method == "noaux_tc"; }
  int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  RouterOptions router_options() const;
  OpLimits op_limits() const;   // the model's dimensions, every expert local; what a step may hold is the caller's
  float softmax_scale() const;  // qk_head_dim^-0.5 * mscale(factor, mscale_all_dim)^2

  // NotFound, or InvalidArgument / Unimplemented naming file, field, found and expected. A member of the family that no
  // golden file proves (DeepSeek-V3.2's sparse attention, say) is Unimplemented: refused rather than served unproven.
  static absl::StatusOr<ModelConfig> Load(const std::string& model_dir);
  static absl::StatusOr<ModelConfig> Parse(const std::string& json, const std::string& file_name);
};

inline constexpr float kLatentNormEps = 1e-6f;  // q_a / kv_a layernorm: the official code's default, not rms_norm_eps

// The one cos/sin table: [positions, R] f32, R/2 cosines then R/2 sines; inv_freq rounded to fp32 from
// double, angle = fp32(position * inv_freq), cos and sin of that angle in double, times the mscale ratio, rounded.
std::vector<float> MakeRopeTable(const ModelConfig& config, int positions);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_CONFIG_H_
