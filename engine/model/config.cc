// config.json of the DeepSeek-V3 family: every spelling of its fields, and what is refused by name.
#include "engine/model/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/model/config_fields.h"
#include "engine/model/json_file.h"

namespace cachalot {
namespace {

using Json = nlohmann::json;
using Fields = ConfigFields;

constexpr int kMaxDim = 1 << 24;
constexpr int kMaxLayers = 1024;
constexpr int kMaxExperts = 1 << 14;
constexpr int64_t kMaxExpertsOfAllLayers = 1 << 18;  // bounds the tensor table: V3 has 14,848
constexpr int kMaxExpertsPerToken = 32;

double YarnMscale(double factor, double mscale) { return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0; }

void ParseModelType(const Fields& fields, ModelConfig* config) {
  config->model_type = fields.String("model_type");
  if (config->model_type == "deepseek_v32" || fields.Has("index_topk")) {
    fields.RefuseUnimplemented(config->model_type == "deepseek_v32" ? "model_type" : "index_topk",
                               "a model without sparse attention: DeepSeek-V3.2's indexer is not implemented");
  } else if (config->model_type != "deepseek_v3" && config->model_type != "deepseek_v2" &&
             config->model_type != "kimi_k2") {
    fields.RefuseUnimplemented("model_type", "deepseek_v3, deepseek_v2 or kimi_k2");
  }
}

void ParseDims(const Fields& fields, ModelConfig* config) {
  config->vocab_size = fields.Int("vocab_size", 1, kMaxDim);
  config->hidden_size = fields.Int("hidden_size", 1, kMaxDim);
  config->intermediate_size = fields.Int("intermediate_size", 1, kMaxDim);
  config->num_hidden_layers = fields.Int("num_hidden_layers", 1, kMaxLayers);
  config->num_nextn_predict_layers = fields.IntOr("num_nextn_predict_layers", 0, 0, kMaxLayers);
  config->num_attention_heads = fields.Int("num_attention_heads", 1, kMaxDim);
  config->q_lora_rank = fields.IntOr("q_lora_rank", 0, 1, kMaxDim);
  config->kv_lora_rank = fields.Int("kv_lora_rank", 1, kMaxDim);
  config->qk_nope_head_dim = fields.Int("qk_nope_head_dim", 1, kMaxDim);
  config->qk_rope_head_dim = fields.Int("qk_rope_head_dim", 2, kMaxDim);
  config->v_head_dim = fields.Int("v_head_dim", 1, kMaxDim);
  config->max_position_embeddings = fields.Int("max_position_embeddings", 1, kMaxDim);
  config->rms_norm_eps = fields.Double("rms_norm_eps", 0.0, 1.0);
  config->bos_token_id = fields.IntOr("bos_token_id", -1, 0, config->vocab_size - 1);
  config->eos_token_ids = fields.Ints("eos_token_id", 0, config->vocab_size - 1);

  if (config->qk_rope_head_dim % 2 != 0) fields.Refuse("qk_rope_head_dim", "an even number");
  const int64_t widest_head =
      config->qk_nope_head_dim + static_cast<int64_t>(std::max(config->qk_rope_head_dim, config->v_head_dim));
  if (config->num_attention_heads * widest_head > kMaxDim) {
    fields.Refuse("num_attention_heads", absl::StrCat("heads x head dimensions of at most ", kMaxDim));
  }
  if (fields.Has("qk_head_dim") && fields.Int("qk_head_dim", 1, kMaxDim) != config->qk_head_dim()) {
    fields.Refuse("qk_head_dim", absl::StrCat("qk_nope_head_dim + qk_rope_head_dim = ", config->qk_head_dim()));
  }
}

// Variants of the architecture that nothing here computes.
void RefuseVariants(const Fields& fields) {
  if (fields.BoolOr("attention_bias", false)) fields.RefuseUnimplemented("attention_bias", "false");
  if (fields.BoolOr("tie_word_embeddings", false)) fields.RefuseUnimplemented("tie_word_embeddings", "false");
  if (!fields.BoolOr("rope_interleave", true)) fields.RefuseUnimplemented("rope_interleave", "true");
  if (fields.StringOr("hidden_act", "silu") != "silu") fields.RefuseUnimplemented("hidden_act", "silu");
  if (fields.Has("moe_layer_freq") && fields.Int("moe_layer_freq", 1, kMaxLayers) != 1) {
    fields.RefuseUnimplemented("moe_layer_freq", "1");
  }
}

// The rows of the family. A field that a model's own reference code does not have takes the value
// that code computes with: sigmoid and noaux_tc for V3, softmax for V2.
void ParseRouterRule(const Fields& fields, ModelConfig* config) {
  const bool is_v2 = config->model_type == "deepseek_v2";
  config->scoring_func = fields.StringOr("scoring_func", is_v2 ? "softmax" : "sigmoid");
  config->topk_method = is_v2 ? fields.String("topk_method") : fields.StringOr("topk_method", "noaux_tc");
  config->norm_topk_prob = fields.Bool("norm_topk_prob");
  config->routed_scaling_factor = fields.Double("routed_scaling_factor", 0.0, 1e6);
  const std::string& method = config->topk_method;
  if (config->scoring_func == "sigmoid") {
    if (method != "noaux_tc") fields.RefuseUnimplemented("topk_method", "noaux_tc, as scoring_func is sigmoid");
  } else if (config->scoring_func == "softmax") {
    if (method != "greedy" && method != "group_limited_greedy") {
      fields.RefuseUnimplemented("topk_method", "greedy or group_limited_greedy, as scoring_func is softmax");
    }
    // NOTE: with both, V2's own code leaves the scaling factor out and others do not.
    if (config->norm_topk_prob) fields.RefuseUnimplemented("norm_topk_prob", "false, as scoring_func is softmax");
  } else {
    fields.RefuseUnimplemented("scoring_func", "sigmoid or softmax");
  }
}

void ParseExperts(const Fields& fields, ModelConfig* config) {
  if (fields.IsNull("n_routed_experts")) return;  // a dense model
  const int experts = fields.Int("n_routed_experts", 0, kMaxExperts);
  if (experts == 0) return;
  config->n_routed_experts = experts;
  config->n_shared_experts = fields.IsNull("n_shared_experts") ? 0 : fields.Int("n_shared_experts", 0, kMaxExperts);
  config->moe_intermediate_size = fields.Int("moe_intermediate_size", 1, kMaxDim);
  // Beyond num_hidden_layers: every layer is dense, and expert tensors contradict the config.
  config->first_k_dense_replace = fields.Int("first_k_dense_replace", 0, kMaxDim);
  config->num_experts_per_tok = fields.Int("num_experts_per_tok", 1, kMaxExpertsPerToken);
  config->n_group = fields.IntOr("n_group", 1, 1, kMaxExperts);
  config->topk_group = fields.IntOr("topk_group", 1, 1, kMaxExperts);
  ParseRouterRule(fields, config);

  const int64_t layers = config->num_hidden_layers + config->num_nextn_predict_layers;
  if (layers * experts > kMaxExpertsOfAllLayers) {
    fields.Refuse("n_routed_experts", absl::StrCat("at most ", kMaxExpertsOfAllLayers, " experts in all layers"));
  }
  if (static_cast<int64_t>(config->n_shared_experts) * config->moe_intermediate_size > kMaxDim) {
    fields.Refuse("n_shared_experts", absl::StrCat("shared experts of at most ", kMaxDim, " features in all"));
  }
  if (config->topk_group > config->n_group) {
    fields.Refuse("topk_group", absl::StrCat("at most n_group = ", config->n_group));
  }
  if (experts % config->n_group != 0) {
    fields.Refuse("n_routed_experts", absl::StrCat("a multiple of n_group = ", config->n_group));
  }
  const RouterOptions router = config->router_options();
  const int group_size = experts / router.n_group;
  if (router.n_group > 1 && router.group_score == RouterOptions::GroupScore::kTop2Sum && group_size < 2) {
    fields.Refuse("n_group", "groups of at least two experts, whose two best make the group's score");
  }
  if (config->num_experts_per_tok > router.topk_group * group_size) {
    fields.Refuse("num_experts_per_tok",
                  absl::StrCat("at most the ", router.topk_group * group_size, " experts of topk_group groups"));
  }
}

// One of three spellings: `rope_scaling` with `type` or `rope_type`, or `rope_parameters`.
void ParseRopeBlock(const Fields& block, ModelConfig* config) {
  const std::string type = block.Has("type") ? block.String("type") : block.String("rope_type");
  if (block.Has("type") && block.Has("rope_type") && block.String("rope_type") != type) {
    block.Refuse("rope_type", absl::StrCat("type's ", Printable(type)));
  }
  if (type == "default") return;
  if (type != "yarn") {
    block.RefuseUnimplemented(block.Has("type") ? "type" : "rope_type", "yarn or default");
    return;
  }
  RopeScaling& rope = config->rope_scaling;
  rope.is_yarn = true;
  rope.factor = block.Double("factor", 1.0, 1e6);
  rope.original_max_position_embeddings = block.Int("original_max_position_embeddings", 1, kMaxDim);
  rope.beta_fast = block.DoubleOr("beta_fast", rope.beta_fast, 1e-3, 1e6);
  rope.beta_slow = block.DoubleOr("beta_slow", rope.beta_slow, 1e-3, 1e6);
  rope.mscale = block.DoubleOr("mscale", rope.mscale, 0.0, 100.0);
  rope.mscale_all_dim = block.DoubleOr("mscale_all_dim", rope.mscale_all_dim, 0.0, 100.0);
  if (rope.beta_slow > rope.beta_fast) block.Refuse("beta_slow", absl::StrCat("at most beta_fast = ", rope.beta_fast));
  if (block.Has("attention_factor")) block.RefuseUnimplemented("attention_factor", "mscale and mscale_all_dim only");
  if (!block.BoolOr("truncate", true)) block.RefuseUnimplemented("truncate", "true");
}

void ParseRope(const Fields& fields, ModelConfig* config) {
  constexpr double kMinTheta = 1.001, kMaxTheta = 1e12;
  const bool has_parameters = fields.Has("rope_parameters");
  if (has_parameters && fields.Has("rope_scaling")) {
    Json parameters = *fields.Get("rope_parameters"), scaling = *fields.Get("rope_scaling");
    if (parameters.is_object()) parameters.erase("rope_theta");
    if (scaling.is_object()) scaling.erase("rope_theta");
    if (parameters != scaling) fields.Refuse("rope_parameters", "the same as rope_scaling");
  }
  const char* block_name = has_parameters ? "rope_parameters" : "rope_scaling";
  if (!fields.Has(block_name)) {
    config->rope_theta = fields.Double("rope_theta", kMinTheta, kMaxTheta);
    return;
  }
  const Fields block = fields.Object(block_name);
  const bool is_inside = block.Has("rope_theta");
  config->rope_theta = (is_inside ? block : fields).Double("rope_theta", kMinTheta, kMaxTheta);
  if (is_inside && fields.Has("rope_theta") &&
      fields.Double("rope_theta", kMinTheta, kMaxTheta) != config->rope_theta) {
    block.Refuse("rope_theta", "the same as the outer rope_theta");
  }
  ParseRopeBlock(block, config);
}

void ParseScaleFormat(const Fields& fields, ModelConfig* config) {
  if (!fields.Has("scale_fmt")) return;
  if (fields.String("scale_fmt") == "ue8m0") {
    config->scale_rule = ScaleRule::kUE8M0;
  } else {
    fields.RefuseUnimplemented("scale_fmt", "ue8m0 or nothing");
  }
}

void ParseQuantization(const Fields& fields, ModelConfig* config) {
  ParseScaleFormat(fields, config);
  if (!fields.Has("quantization_config")) return;
  const Fields block = fields.Object("quantization_config");
  ParseScaleFormat(block, config);
  config->is_fp8 = true;
  if (block.String("quant_method") != "fp8") block.RefuseUnimplemented("quant_method", "fp8");
  if (block.StringOr("fmt", "e4m3") != "e4m3") block.RefuseUnimplemented("fmt", "e4m3");
  if (block.StringOr("activation_scheme", "dynamic") != "dynamic") {
    block.RefuseUnimplemented("activation_scheme", "dynamic");
  }
  if (block.Ints("weight_block_size", 1, kMaxDim) != std::vector<int>{kQuantGroup, kQuantGroup}) {
    block.RefuseUnimplemented("weight_block_size", "[128, 128]");
  }
}

}  // namespace

RouterOptions ModelConfig::router_options() const {
  RouterOptions options;
  options.scoring = scoring_func == "softmax" ? RouterOptions::Scoring::kSoftmax : RouterOptions::Scoring::kSigmoid;
  options.group_score = has_correction_bias() ? RouterOptions::GroupScore::kTop2Sum : RouterOptions::GroupScore::kMax;
  if (topk_method != "greedy") {  // which ignores groups
    options.n_group = n_group;
    options.topk_group = topk_group;
  }
  options.norm_topk_prob = norm_topk_prob;
  options.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  return options;
}

OpLimits ModelConfig::op_limits() const {
  OpLimits limits;
  limits.hidden_size = hidden_size;
  limits.num_heads = num_attention_heads;
  limits.q_lora_rank = q_lora_rank;
  limits.kv_lora_rank = kv_lora_rank;
  limits.qk_rope_head_dim = qk_rope_head_dim;
  limits.qk_nope_head_dim = qk_nope_head_dim;
  limits.v_head_dim = v_head_dim;
  limits.vocab_size = vocab_size;
  limits.max_ffn_width =
      std::max({first_k_dense_replace > 0 ? intermediate_size : 0, n_shared_experts * moe_intermediate_size,
                n_routed_experts > 0 ? moe_intermediate_size : intermediate_size});
  if (first_k_dense_replace < num_hidden_layers) {
    limits.num_experts = limits.num_local_experts = n_routed_experts;
    limits.num_experts_per_tok = n_routed_experts > 0 ? num_experts_per_tok : 0;
  }
  return limits;
}

float ModelConfig::softmax_scale() const {
  const double m =
      rope_scaling.is_yarn ? YarnMscale(rope_scaling.factor, rope_scaling.mscale_all_dim) : 1.0;  // 1 for all_dim 0
  return static_cast<float>(m * m / std::sqrt(static_cast<double>(qk_head_dim())));
}

absl::StatusOr<ModelConfig> ModelConfig::Load(const std::string& model_dir) {
  const std::string path = PathIn(model_dir, "config.json");
  absl::StatusOr<std::string> json = ReadConfigText(path);
  if (!json.ok()) return json.status();
  return Parse(*json, path);
}

absl::StatusOr<ModelConfig> ModelConfig::Parse(const std::string& json, const std::string& file_name) {
  absl::StatusOr<Json> root = ParseConfigObject(json, file_name);
  if (!root.ok()) return root.status();
  absl::Status status;
  const Fields fields(&*root, file_name + ": ", &status);
  ModelConfig config;
  ParseModelType(fields, &config);
  if (!status.ok()) return status;
  ParseDims(fields, &config);
  if (!status.ok()) return status;
  RefuseVariants(fields);
  ParseExperts(fields, &config);
  ParseRope(fields, &config);
  ParseQuantization(fields, &config);
  if (!status.ok()) return status;
  return config;
}

std::vector<float> MakeRopeTable(const ModelConfig& config, int positions) {
  const RopeScaling& yarn = config.rope_scaling;
  const int dim = config.qk_rope_head_dim, half = dim / 2;

  // Inverse frequencies: a ramp from unscaled (fast) to divided by factor (slow).
  std::vector<float> inv_freq(half);
  double low = 0, high = 0;
  if (yarn.is_yarn) {
    // The dimension that turns `rotations` times within the original context.
    auto correction_dim = [&](double rotations) {
      return dim * std::log(yarn.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
             (2 * std::log(config.rope_theta));
    };
    low = std::max(std::floor(correction_dim(yarn.beta_fast)), 0.0);
    high = std::min(std::ceil(correction_dim(yarn.beta_slow)), dim - 1.0);
    if (low == high) high += 0.001;
  }
  for (int i = 0; i < half; ++i) {
    const double freq = std::pow(config.rope_theta, -2.0 * i / dim);
    const double ramp = yarn.is_yarn ? std::clamp((i - low) / (high - low), 0.0, 1.0) : 0.0;
    inv_freq[i] = static_cast<float>(freq / yarn.factor * ramp + freq * (1.0 - ramp));
  }

  const double ratio =
      yarn.is_yarn ? YarnMscale(yarn.factor, yarn.mscale) / YarnMscale(yarn.factor, yarn.mscale_all_dim) : 1.0;
  std::vector<float> table(static_cast<size_t>(positions) * dim);
  for (int position = 0; position < positions; ++position) {
    float* row = table.data() + static_cast<size_t>(position) * dim;
    for (int i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * inv_freq[i];  // NOTE: the product is rounded to fp32
      row[i] = static_cast<float>(std::cos(angle) * ratio);
      row[half + i] = static_cast<float>(std::sin(angle) * ratio);
    }
  }
  return table;
}

}  // namespace cachalot
