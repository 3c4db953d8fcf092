// What is wrong with a checkpoint, tensor by tensor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "engine/model/json_file.h"
#include "engine/model/tensor_table.h"
#include "engine/model/weights.h"

namespace cachalot {
namespace {

constexpr size_t kMaxProblems = 1000;

std::string Describe(absl::string_view dtype, const std::vector<int64_t>& shape) {
  return absl::StrCat(dtype, "[", absl::StrJoin(shape, ", "), "]");
}
std::string Describe(const CheckpointTensor& tensor) { return Describe(tensor.dtype, tensor.shape); }

// "[3, 17]" of element `i`.
std::string Position(int64_t i, const std::vector<int64_t>& shape) {
  std::vector<int64_t> indices(shape.size());
  for (size_t axis = shape.size(); axis-- > 0;) {
    indices[axis] = i % shape[axis];
    i /= shape[axis];
  }
  return absl::StrCat("[", absl::StrJoin(indices, ", "), "]");
}

// First of `count` values whose `exponent` bits are all ones (NaN or infinity), or -1. Scans in blocks, so that the
// compiler can vectorise.
template <typename Bits>
int64_t FindNonFinite(const uint8_t* data, int64_t count, Bits exponent) {
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) {
      Bits bits;  // NOTE: the file promises no alignment
      std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));
      found |= (bits & exponent) == exponent;
    }
    if (!found) continue;
    for (int64_t i = begin; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, data + i * sizeof(Bits), sizeof(Bits));
      if ((bits & exponent) == exponent) return i;
    }
  }
  return -1;
}

// First value that is not finite (as an f32: F64 only occurs where it is converted), or -1.
int64_t FindNonFinite(const CheckpointTensor& tensor) {
  if (tensor.dtype == "F8_E4M3") return FindNonFinite<uint8_t>(tensor.data, tensor.num_bytes, 0x7f);
  if (tensor.dtype == "BF16") return FindNonFinite<uint16_t>(tensor.data, tensor.num_bytes / 2, 0x7f80);
  if (tensor.dtype == "F16") return FindNonFinite<uint16_t>(tensor.data, tensor.num_bytes / 2, 0x7c00);
  if (tensor.dtype == "F32") return FindNonFinite<uint32_t>(tensor.data, tensor.num_bytes / 4, 0x7f800000);
  for (uint64_t i = 0; i < tensor.num_bytes / sizeof(double); ++i) {
    double value;
    std::memcpy(&value, tensor.data + i * sizeof value, sizeof value);
    if (!std::isfinite(static_cast<float>(value))) return static_cast<int64_t>(i);
  }
  return -1;
}

// "mlp.gate.weight" of "model.layers.3.mlp.gate.weight", and its 3.
std::optional<std::pair<int64_t, absl::string_view>> SplitLayer(absl::string_view name) {
  if (!absl::ConsumePrefix(&name, "model.layers.")) return std::nullopt;
  const size_t dot = name.find('.');
  int64_t layer = 0;
  if (dot == name.npos || !absl::SimpleAtoi(name.substr(0, dot), &layer)) return std::nullopt;
  return std::pair(layer, name.substr(dot + 1));
}

class Checker {
 public:
  Checker(const ModelConfig& config, const Checkpoint& checkpoint, bool deep)
      : config_(config), checkpoint_(checkpoint), deep_(deep) {}

  std::vector<std::string> Run() {
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (const auto split = SplitLayer(name)) present_layers_.insert(split->first);
    }
    const std::vector<ExpectedTensor> expected = ExpectedTensors(config_);
    for (const ExpectedTensor& tensor : expected) {
      if (tensor.mtp_layer >= 0 && !present_layers_.contains(tensor.mtp_layer)) continue;
      CheckTensor(tensor);
    }
    CheckUnexpected();
    if (num_problems_ > problems_.size()) {
      problems_.push_back(absl::StrCat("... and ", num_problems_ - problems_.size(), " more problems"));
    }
    return std::move(problems_);
  }

 private:
  void Report(const CheckpointTensor* tensor, absl::string_view name, absl::string_view found,
              absl::string_view expected) {
    if (++num_problems_ > kMaxProblems) return;
    const std::string& file = tensor == nullptr ? checkpoint_.model_dir() : checkpoint_.files()[tensor->file_idx];
    problems_.push_back(absl::StrCat(file, ": ", Printable(name), ": found ", found, ", expected ", expected));
  }

  void CheckTensor(const ExpectedTensor& expected) {
    const CheckpointTensor* tensor = checkpoint_.Find(expected.name);
    known_.insert(expected.name);
    if (tensor == nullptr) {
      if (!expected.is_optional) Report(nullptr, expected.name, "nothing", Describe("", expected.shape));
      return;
    }
    if (tensor->shape != expected.shape) {
      Report(tensor, expected.name, Describe(*tensor), Describe(tensor->dtype, expected.shape));
      return;
    }
    const std::string& dtype = tensor->dtype;
    const bool is_fp8 = dtype == "F8_E4M3";
    const bool is_float = dtype == "BF16" || dtype == "F16" || dtype == "F32";
    const bool is_allowed = is_float || (is_fp8 && expected.use == TensorUse::kLinear) ||
                            (dtype == "F64" && expected.use == TensorUse::kBias);
    if (!is_allowed) {
      Report(tensor, expected.name, Describe(*tensor),
             expected.use == TensorUse::kLinear ? "BF16, F16, F32 or F8_E4M3" : "BF16, F16 or F32");
      return;
    }
    if (is_fp8 && !config_.is_fp8) {
      Report(tensor, expected.name, Describe(*tensor), "BF16, F16 or F32, as config.json has no quantization_config");
    }
    if (expected.use == TensorUse::kLinear) CheckScales(expected, is_fp8);
    CheckStack(expected, *tensor);
    if (deep_ || expected.use == TensorUse::kVector || expected.use == TensorUse::kBias) {
      if (const int64_t i = FindNonFinite(*tensor); i >= 0) {
        Report(tensor, expected.name + Position(i, tensor->shape), "NaN or infinity", "a finite value");
      }
    }
  }

  void CheckScales(const ExpectedTensor& expected, bool is_fp8) {
    const std::string name = expected.name + kScaleSuffix;
    const CheckpointTensor* scales = checkpoint_.Find(name);
    const std::string wanted = Describe("F32", ScaleShape(expected.shape));
    known_.insert(name);
    if (!is_fp8) {
      if (scales != nullptr) Report(scales, name, Describe(*scales), "no scales, as the weight is not FP8");
      return;
    }
    if (scales == nullptr) {
      Report(nullptr, name, "nothing", wanted + ", as the weight is F8_E4M3");
      return;
    }
    if (Describe(*scales) != wanted) {
      Report(scales, name, Describe(*scales), wanted);
      return;
    }
    for (uint64_t i = 0; i < scales->num_bytes / sizeof(float); ++i) {
      float scale;
      std::memcpy(&scale, scales->data + i * sizeof scale, sizeof scale);
      if (scale > 0.0f && std::isfinite(scale)) continue;
      Report(scales, name + Position(i, scales->shape), absl::StrCat(scale), "a finite scale above 0");
      return;
    }
  }

  // The first of a stack decides how the others are stored.
  void CheckStack(const ExpectedTensor& expected, const CheckpointTensor& tensor) {
    if (expected.stack < 0) return;
    const auto [it, is_first] = stack_dtypes_.try_emplace(expected.stack, tensor.dtype);
    if (!is_first && it->second != tensor.dtype) {
      Report(&tensor, expected.name, Describe(tensor), absl::StrCat(it->second, ", as those it is stacked with"));
    }
  }

  // What the table does not name: harmless, or a contradiction of the config.
  void CheckUnexpected() {
    std::vector<absl::string_view> names;
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (!known_.contains(name) && !absl::EndsWith(name, "rotary_emb.inv_freq")) names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    for (absl::string_view name : names) {
      const std::string expected = Contradiction(name);
      if (expected.empty()) continue;
      const CheckpointTensor* tensor = checkpoint_.Find(std::string(name));
      Report(tensor, name, Describe(*tensor), expected);
    }
  }

  // What the config leads to expect instead of the unknown tensor; empty when it is merely ignored.
  std::string Contradiction(absl::string_view name) const {
    if (absl::string_view module = name; absl::ConsumeSuffix(&module, ".bias")) {
      if (known_.contains(absl::StrCat(module, ".weight"))) return "no bias";
    }
    const auto split = SplitLayer(name);
    if (!split) return "";
    auto [layer, rest] = *split;
    if (layer >= config_.num_hidden_layers + config_.num_nextn_predict_layers) {
      return absl::StrCat("no layer beyond num_hidden_layers ", config_.num_hidden_layers,
                          " + num_nextn_predict_layers ", config_.num_nextn_predict_layers);
    }
    if (absl::string_view expert = rest; absl::ConsumePrefix(&expert, "mlp.experts.")) {
      if (!config_.is_moe_layer(layer)) return "no experts, as the layer is dense";
      int64_t idx = 0;
      if (absl::SimpleAtoi(expert.substr(0, expert.find('.')), &idx) && idx >= config_.n_routed_experts) {
        return absl::StrCat("no expert beyond n_routed_experts ", config_.n_routed_experts);
      }
    }
    if (rest == "mlp.gate.e_score_correction_bias") {
      return config_.is_moe_layer(layer) ? absl::StrCat("no bias, as topk_method is ", config_.topk_method)
                                         : "no router, as the layer is dense";
    }
    // NOTE: to leave a weight out of the computation would be to serve another model. Other tensors of a layer, such
    // as scales of a quantised KV cache, are hints.
    if (absl::EndsWith(rest, ".weight") || absl::EndsWith(rest, ".bias")) return "no such weight in this architecture";
    return "";
  }

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  const bool deep_;
  absl::flat_hash_set<int64_t> present_layers_;
  absl::flat_hash_set<std::string> known_;  // names of the table, those of their scales included
  absl::flat_hash_map<int, std::string> stack_dtypes_;
  std::vector<std::string> problems_;
  size_t num_problems_ = 0;
};

}  // namespace

std::vector<std::string> ModelWeights::Problems(const ModelConfig& config, const Checkpoint& checkpoint, bool deep) {
  return Checker(config, checkpoint, deep).Run();
}

}  // namespace cachalot
