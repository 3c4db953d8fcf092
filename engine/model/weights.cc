// From checkpoint tensors to the backend's prepared weights.
#include "engine/model/weights.h"

#include <cstring>
#include <initializer_list>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/model/tensor_table.h"
#include "kernels/half_float.h"

namespace cachalot {
namespace {

// A tensor that passed Problems, as the backend sees it.
Tensor View(const CheckpointTensor& tensor) {
  DType dtype = DType::kF32;
  if (tensor.dtype == "BF16") dtype = DType::kBF16;
  if (tensor.dtype == "F16") dtype = DType::kF16;
  if (tensor.dtype == "F8_E4M3") dtype = DType::kF8E4M3;
  void* data = const_cast<uint8_t*>(tensor.data);  // NOTE: mapped read-only; nobody writes through it
  if (tensor.shape.size() == 1) return Tensor(data, dtype, {tensor.shape[0]});
  return Tensor(data, dtype, {tensor.shape[0], tensor.shape[1]});
}

// A finite BF16, F16 or F64 vector in f32.
std::vector<float> ToFloats(const CheckpointTensor& tensor) {
  std::vector<float> values(tensor.shape[0]);
  for (size_t i = 0; i < values.size(); ++i) {
    if (tensor.dtype == "F64") {
      double value;
      std::memcpy(&value, tensor.data + i * sizeof value, sizeof value);
      values[i] = static_cast<float>(value);
      continue;
    }
    uint16_t bits;
    std::memcpy(&bits, tensor.data + i * sizeof bits, sizeof bits);
    values[i] = tensor.dtype == "F16" ? F16ToFloat(bits) : Bf16ToFloat(bits);
  }
  return values;
}

// Makes weights by name. The checkpoint has no problems: what is not there is our bug.
class Loader {
 public:
  Loader(const ModelConfig& config, const Checkpoint& checkpoint, const RankExperts& experts, Ops& ops)
      : config_(config), checkpoint_(checkpoint), experts_(experts), ops_(ops) {}

  ModelWeights Load(bool with_mtp) {
    ModelWeights weights;
    prefix_ = "model.";
    weights.embed_tokens = Linear({"embed_tokens"});
    weights.norm = Vector("norm");
    for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
      LoadLayer(layer, &weights.layers.emplace_back(), &weights.converted);
    }
    if (with_mtp) LoadMtp(&weights);
    prefix_.clear();
    weights.lm_head = Linear({"lm_head"});
    return weights;
  }

 private:
  const CheckpointTensor& Get(const std::string& name) const {
    const CheckpointTensor* tensor = checkpoint_.Find(prefix_ + name);
    CHECK(tensor != nullptr, "{}{}", prefix_, name);
    return *tensor;
  }

  WeightPart Part(const std::string& module) const {
    const CheckpointTensor& weight = Get(module + ".weight");
    if (weight.dtype != "F8_E4M3") return {View(weight), Tensor()};
    return {View(weight), View(Get(absl::StrCat(module, ".weight", kScaleSuffix)))};
  }

  WeightPtr Vector(const std::string& module) const { return ops_.MakeVector(View(Get(module + ".weight"))); }

  WeightPtr Linear(std::initializer_list<std::string> row_stacked) const {
    std::vector<WeightPart> parts;
    for (const std::string& module : row_stacked) parts.push_back(Part(module));
    return ops_.MakeLinear(parts);
  }

  void LoadLayer(int index, LayerWeights* layer, std::vector<std::vector<float>>* converted) {
    prefix_ = LayerPrefix(index);
    LoadAttention(layer);
    if (config_.is_moe_layer(index)) {
      LoadMoe(experts_.held[index], layer, converted);
    } else {
      LoadMlp("mlp.", layer);
    }
  }

  void LoadMtp(ModelWeights* weights) {
    weights->mtp = std::make_unique<MtpWeights>();
    LoadLayer(config_.num_hidden_layers, &weights->mtp->layer, &weights->converted);
    weights->mtp->enorm = Vector("enorm");
    weights->mtp->hnorm = Vector("hnorm");
    weights->mtp->eh_proj = Linear({"eh_proj"});
    weights->mtp->shared_head_norm = Vector("shared_head.norm");
  }

  void LoadAttention(LayerWeights* layer) const {
    layer->input_layernorm = Vector("input_layernorm");
    layer->post_attention_layernorm = Vector("post_attention_layernorm");
    if (config_.q_lora_rank > 0) {
      layer->q_kv_a_proj = Linear({"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"});
      layer->q_a_layernorm = Vector("self_attn.q_a_layernorm");
      layer->q_b_proj = Linear({"self_attn.q_b_proj"});
    } else {
      layer->q_kv_a_proj = Linear({"self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"});
    }
    layer->kv_a_layernorm = Vector("self_attn.kv_a_layernorm");
    layer->kv_b_proj = ops_.MakeKvUp(Part("self_attn.kv_b_proj"), config_.num_attention_heads, config_.qk_nope_head_dim,
                                     config_.v_head_dim);
    layer->o_proj = Linear({"self_attn.o_proj"});
  }

  void LoadMlp(const std::string& mlp, LayerWeights* layer) const {
    layer->gate_up_proj = Linear({mlp + "gate_proj", mlp + "up_proj"});
    layer->down_proj = Linear({mlp + "down_proj"});
  }

  void LoadMoe(const ExpertList& experts, LayerWeights* layer, std::vector<std::vector<float>>* converted) const {
    layer->gate = Linear({"mlp.gate"});
    if (config_.has_correction_bias()) {
      const CheckpointTensor& bias = Get("mlp.gate.e_score_correction_bias");
      Tensor view = View(bias);
      if (bias.data == nullptr) {  // made up: every expert's chance is the same
        std::vector<float>& values = converted->emplace_back(bias.shape[0]);
        view = Tensor(values.data(), DType::kF32, {bias.shape[0]});
      } else if (bias.dtype != "F32") {  // computed in f32 whatever it is stored as
        std::vector<float>& values = converted->emplace_back(ToFloats(bias));
        view = Tensor(values.data(), DType::kF32, {bias.shape[0]});
      }
      layer->e_score_correction_bias = ops_.MakeVector(view);
    }
    if (config_.n_shared_experts > 0) LoadMlp("mlp.shared_experts.", layer);
    std::vector<std::vector<WeightPart>> gate_up, down;
    for (int expert : experts) {
      const std::string mlp = absl::StrCat("mlp.experts.", expert, ".");
      gate_up.push_back({Part(mlp + "gate_proj"), Part(mlp + "up_proj")});
      down.push_back({Part(mlp + "down_proj")});
    }
    layer->experts_gate_up_proj = ops_.MakeExperts(gate_up);
    layer->experts_down_proj = ops_.MakeExperts(down);
  }

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  const RankExperts& experts_;
  Ops& ops_;
  std::string prefix_;
};

absl::Status CheckLoadable(const ModelConfig& config, const Checkpoint& checkpoint, const RankExperts& experts) {
  CHECK(experts.held.size() == static_cast<size_t>(config.num_hidden_layers) + 1, "experts of {} layers",
        experts.held.size());
  for (const ExpertList& layer : experts.held) {
    CHECK(config.n_routed_experts == 0 || (!layer.empty() && layer.size() == experts.held[0].size()));
    for (int expert : layer) {
      CHECK(expert >= 0 && expert < config.n_routed_experts, "expert {} of {}", expert, config.n_routed_experts);
    }
  }
  std::vector<std::string> problems;
  if (checkpoint.has_data()) problems = ModelWeights::Problems(config, checkpoint, /*deep=*/false);
  if (!problems.empty()) {
    return absl::InvalidArgumentError(
        problems.size() == 1 ? problems[0]
                             : absl::StrCat(problems[0], " (and ", problems.size() - 1, " more problems)"));
  }
  return absl::OkStatus();
}

}  // namespace

bool ModelWeights::HasMtp(const ModelConfig& config, const Checkpoint& checkpoint) {
  return config.num_nextn_predict_layers > 0 &&
         checkpoint.Find(LayerPrefix(config.num_hidden_layers) + "eh_proj.weight") != nullptr;
}

absl::StatusOr<ModelWeights> ModelWeights::Load(const ModelConfig& config, const Checkpoint& checkpoint,
                                                const RankExperts& experts, bool with_mtp, Ops& ops) {
  if (absl::Status status = CheckLoadable(config, checkpoint, experts); !status.ok()) return status;
  ModelWeights weights = Loader(config, checkpoint, experts, ops).Load(with_mtp);
  if (absl::Status status = ops.FinishWeights(); !status.ok()) return status;
  return weights;
}

absl::StatusOr<int64_t> ModelWeights::DeviceBytes(const ModelConfig& config, const Checkpoint& checkpoint,
                                                  const RankExperts& experts, bool with_mtp, Ops& ops) {
  if (absl::Status status = CheckLoadable(config, checkpoint, experts); !status.ok()) return status;
  return ops.MeasureWeights([&] { Loader(config, checkpoint, experts, ops).Load(with_mtp); });
}

}  // namespace cachalot
