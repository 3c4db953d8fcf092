// Names and shapes of a checkpoint's tensors, layer by layer.
#include "engine/model/tensor_table.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

class Table {
 public:
  explicit Table(const ModelConfig& config) : config_(config) {}

  std::vector<ExpectedTensor> Build() {
    const int64_t d = config_.hidden_size, w = config_.vocab_size;
    prefix_ = "model.";
    Add("embed_tokens.weight", {w, d}, TensorKind::kEmbedding, TensorUse::kFloat);
    const int num_layers = config_.num_hidden_layers;
    for (int layer = 0; layer < num_layers + config_.num_nextn_predict_layers; ++layer) {
      prefix_ = LayerPrefix(layer);
      mtp_layer_ = layer < num_layers ? -1 : layer;
      if (mtp_layer_ >= 0) AddMtp();
      AddAttention();
      if (config_.is_moe_layer(layer)) {
        AddMoe();
      } else {
        AddDense();
      }
    }
    mtp_layer_ = -1;
    prefix_ = "model.";
    Add("norm.weight", {d}, TensorKind::kNorm, TensorUse::kVector);
    prefix_.clear();
    Add("lm_head.weight", {w, d}, TensorKind::kHead, TensorUse::kFloat);
    return std::move(tensors_);
  }

 private:
  ExpectedTensor& Add(const std::string& name, std::vector<int64_t> shape, TensorKind kind, TensorUse use,
                      int stack = -1) {
    ExpectedTensor& tensor = tensors_.emplace_back();
    tensor.name = prefix_ + name;
    tensor.shape = std::move(shape);
    tensor.kind = mtp_layer_ >= 0 ? TensorKind::kMtp : kind;
    tensor.use = use;
    tensor.mtp_layer = mtp_layer_;
    tensor.stack = stack;
    return tensor;
  }

  void AddAttention() {
    const int64_t d = config_.hidden_size, h = config_.num_attention_heads, q = config_.q_lora_rank;
    const int64_t c = config_.kv_lora_rank, v = config_.v_head_dim, qk = config_.qk_head_dim();
    const int64_t n = config_.qk_nope_head_dim, r = config_.qk_rope_head_dim;
    constexpr TensorKind kKind = TensorKind::kAttention;
    const int stack = num_stacks_++;
    Add("input_layernorm.weight", {d}, TensorKind::kNorm, TensorUse::kVector);
    if (q > 0) {
      Add("self_attn.q_a_proj.weight", {q, d}, kKind, TensorUse::kLinear, stack);
      Add("self_attn.q_a_layernorm.weight", {q}, TensorKind::kNorm, TensorUse::kVector);
      Add("self_attn.q_b_proj.weight", {h * qk, q}, kKind, TensorUse::kLinear);
    } else {
      Add("self_attn.q_proj.weight", {h * qk, d}, kKind, TensorUse::kLinear, stack);
    }
    Add("self_attn.kv_a_proj_with_mqa.weight", {c + r, d}, kKind, TensorUse::kLinear, stack);
    Add("self_attn.kv_a_layernorm.weight", {c}, TensorKind::kNorm, TensorUse::kVector);
    Add("self_attn.kv_b_proj.weight", {h * (n + v), c}, kKind, TensorUse::kLinear);
    Add("self_attn.o_proj.weight", {d, h * v}, kKind, TensorUse::kLinear);
    Add("post_attention_layernorm.weight", {d}, TensorKind::kNorm, TensorUse::kVector);
  }

  // gate_proj and up_proj of one stack, down_proj of another.
  void AddMlp(const std::string& name, int64_t width, TensorKind kind, int gate_up_stack, int down_stack) {
    const int64_t d = config_.hidden_size;
    Add(name + "gate_proj.weight", {width, d}, kind, TensorUse::kLinear, gate_up_stack);
    Add(name + "up_proj.weight", {width, d}, kind, TensorUse::kLinear, gate_up_stack);
    Add(name + "down_proj.weight", {d, width}, kind, TensorUse::kLinear, down_stack);
  }

  void AddDense() { AddMlp("mlp.", config_.intermediate_size, TensorKind::kDenseMlp, num_stacks_++, -1); }

  void AddMoe() {
    const int64_t d = config_.hidden_size, e = config_.n_routed_experts, f = config_.moe_intermediate_size;
    Add("mlp.gate.weight", {e, d}, TensorKind::kRouter, TensorUse::kFloat);
    if (config_.has_correction_bias()) {
      Add("mlp.gate.e_score_correction_bias", {e}, TensorKind::kRouter, TensorUse::kBias);
    }
    const int gate_up_stack = num_stacks_++, down_stack = num_stacks_++;
    for (int expert = 0; expert < e; ++expert) {
      AddMlp(absl::StrCat("mlp.experts.", expert, "."), f, TensorKind::kRoutedExperts, gate_up_stack, down_stack);
    }
    if (config_.n_shared_experts > 0) {
      AddMlp("mlp.shared_experts.", f * config_.n_shared_experts, TensorKind::kSharedExperts, num_stacks_++, -1);
    }
  }

  void AddMtp() {
    const int64_t d = config_.hidden_size, w = config_.vocab_size;
    Add("embed_tokens.weight", {w, d}, TensorKind::kMtp, TensorUse::kFloat).is_optional = true;
    Add("enorm.weight", {d}, TensorKind::kMtp, TensorUse::kVector);
    Add("hnorm.weight", {d}, TensorKind::kMtp, TensorUse::kVector);
    Add("eh_proj.weight", {d, 2 * d}, TensorKind::kMtp, TensorUse::kFloat);
    Add("shared_head.norm.weight", {d}, TensorKind::kMtp, TensorUse::kVector);
    Add("shared_head.head.weight", {w, d}, TensorKind::kMtp, TensorUse::kFloat).is_optional = true;
  }

  const ModelConfig& config_;
  std::vector<ExpectedTensor> tensors_;
  std::string prefix_;
  int mtp_layer_ = -1;
  int num_stacks_ = 0;
};

}  // namespace

const char* TensorKindName(TensorKind kind) {
  switch (kind) {
    case TensorKind::kEmbedding: return "embedding";
    case TensorKind::kHead: return "head";
    case TensorKind::kAttention: return "attention";
    case TensorKind::kDenseMlp: return "dense MLP";
    case TensorKind::kRoutedExperts: return "routed experts";
    case TensorKind::kSharedExperts: return "shared experts";
    case TensorKind::kRouter: return "router";
    case TensorKind::kNorm: return "norms";
    case TensorKind::kMtp: return "MTP";
  }
  return "?";
}

std::vector<int64_t> ScaleShape(const std::vector<int64_t>& weight_shape) {
  std::vector<int64_t> shape;
  for (int64_t dim : weight_shape) shape.push_back((dim + kQuantGroup - 1) / kQuantGroup);
  return shape;
}

std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config) { return Table(config).Build(); }

ParameterCounts CountParameters(const ModelConfig& config) {
  ParameterCounts counts;
  int64_t routed = 0;
  for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
    const int64_t n = tensor.num_elements();
    (tensor.mtp_layer >= 0 ? counts.mtp : counts.main) += n;
    if (tensor.mtp_layer >= 0 || tensor.use == TensorUse::kBias) continue;
    (tensor.kind == TensorKind::kRoutedExperts ? routed : counts.active) += n;
  }
  if (routed > 0) counts.active += routed / config.n_routed_experts * config.num_experts_per_tok;
  return counts;
}

std::string LayerPrefix(int layer) { return absl::StrCat("model.layers.", layer, "."); }

}  // namespace cachalot
