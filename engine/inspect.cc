// The report that `cachalot inspect` prints.
#include "engine/inspect.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "engine/model/config.h"
#include "engine/model/generation_config.h"
#include "engine/model/json_file.h"
#include "engine/model/safetensors.h"
#include "engine/model/tensor_table.h"
#include "engine/model/weights.h"

namespace cachalot {
namespace {

constexpr size_t kMaxListed = 12;  // names of files or tensors before "..."

// 671026419200 as "671,026,419,200".
std::string Commas(int64_t value) {
  std::string digits = std::to_string(value);
  for (int i = static_cast<int>(digits.size()) - 3; i > 0; i -= 3) digits.insert(i, 1, ',');
  return digits;
}

std::string Bytes(uint64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", value, unit == 0 ? 0 : 2, kUnits[unit]);
}

class Report {
 public:
  Report(const ModelConfig& config, const GenerationConfig& generation, const Checkpoint& checkpoint)
      : config_(config), generation_(generation), checkpoint_(checkpoint) {}

  std::string Write() {
    Line("{}", checkpoint_.model_dir());
    WriteModel();
    WriteRope();
    WriteCache();
    WriteGeneration();
    WriteFiles();
    WriteTensors();
    WriteParameters();
    return std::move(text_);
  }

 private:
  template <typename... Args>
  void Line(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(text_), format, std::forward<Args>(args)...);
    text_ += '\n';
  }

  void WriteModel() {
    const ModelConfig& c = config_;
    int num_moe = 0;
    for (int layer = 0; layer < c.num_hidden_layers; ++layer) num_moe += c.is_moe_layer(layer);
    Line("  type        {}", c.model_type);
    Line("  dimensions  hidden {}, vocabulary {}, dense MLP {}", c.hidden_size, c.vocab_size, c.intermediate_size);
    Line("  layers      {}: {} dense, {} MoE; {} MTP", c.num_hidden_layers, c.num_hidden_layers - num_moe, num_moe,
         c.num_nextn_predict_layers);
    Line("  attention   {} heads of nope {} + rope {}, v {}; q_lora_rank {}, kv_lora_rank {}", c.num_attention_heads,
         c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
         c.q_lora_rank > 0 ? std::to_string(c.q_lora_rank) : "none", c.kv_lora_rank);
    if (c.n_routed_experts > 0) {
      Line("  experts     {} routed, {} a token, {} shared, width {}", c.n_routed_experts, c.num_experts_per_tok,
           c.n_shared_experts, c.moe_intermediate_size);
      Line("  router      {}, {}; {} of {} groups; {}, scaled by {}", c.scoring_func, c.topk_method, c.topk_group,
           c.n_group, c.norm_topk_prob ? "normalised" : "not normalised", c.routed_scaling_factor);
    } else {
      Line("  experts     none");
    }
    Line("  weights     {}", !c.is_fp8                           ? "not quantised"
                             : c.scale_rule == ScaleRule::kUE8M0 ? "fp8 e4m3, scales of 128x128, UE8M0"
                                                                 : "fp8 e4m3, scales of 128x128, fp32");
  }

  void WriteRope() {
    const RopeScaling& yarn = config_.rope_scaling;
    if (yarn.is_yarn) {
      Line("  rope        theta {}, YaRN: factor {} over {}, beta {} to {}, mscale {}, mscale_all_dim {}",
           config_.rope_theta, yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow,
           yarn.mscale, yarn.mscale_all_dim);
    } else {
      Line("  rope        theta {}, plain", config_.rope_theta);
    }
    Line("  softmax     scale {:.7f}", config_.softmax_scale());
    Line("  context     {} tokens", config_.max_position_embeddings);
  }

  void WriteCache() {
    std::vector<std::string> parts;
    for (const auto& [dtype, name] :
         {std::pair(KvDType::kF32, "f32"), std::pair(KvDType::kBF16, "bf16"), std::pair(KvDType::kFP8, "fp8")}) {
      const int64_t layer_bytes = KvTokenBytes(dtype, config_.kv_lora_rank, config_.qk_rope_head_dim);
      std::string part = fmt::format("{} {} bytes", name, Commas(layer_bytes * config_.num_hidden_layers));
      if (config_.num_nextn_predict_layers > 0) {
        part += fmt::format(" ({} with MTP)",
                            Commas(layer_bytes * (config_.num_hidden_layers + config_.num_nextn_predict_layers)));
      }
      parts.push_back(std::move(part));
    }
    Line("  KV a token  {}", absl::StrJoin(parts, ", "));
  }

  void WriteGeneration() {
    std::set<int> ends(config_.eos_token_ids.begin(), config_.eos_token_ids.end());
    ends.insert(generation_.eos_token_ids.begin(), generation_.eos_token_ids.end());
    const std::string sampling = DescribeSampling(generation_.sampling);
    Line("  answers     end at {}; {} by default", ends.empty() ? "no token" : "token " + absl::StrJoin(ends, ", "),
         sampling.empty() ? "temperature 1" : sampling);
  }

  void WriteFiles() {
    const std::vector<std::string>& files = checkpoint_.files();
    uint64_t total = 0;
    for (size_t i = 0; i < files.size(); ++i) total += checkpoint_.file_bytes(static_cast<int>(i));
    Line("\n{} {}, {} bytes ({})", files.size(), files.size() == 1 ? "file" : "files", Commas(total), Bytes(total));
    for (size_t i = 0; i < std::min(files.size(), kMaxListed); ++i) {
      Line("  {}  {}", Printable(std::filesystem::path(files[i]).filename().string()),
           Bytes(checkpoint_.file_bytes(static_cast<int>(i))));
    }
    if (files.size() > kMaxListed) Line("  ...");
  }

  struct Group {
    int64_t count = 0;
    uint64_t bytes = 0;
    std::set<std::string> dtypes;
  };

  void WriteTensors() {
    absl::flat_hash_map<std::string, TensorKind> kinds;
    for (ExpectedTensor& tensor : ExpectedTensors(config_)) kinds.emplace(std::move(tensor.name), tensor.kind);
    constexpr int kScales = kNumTensorKinds, kOther = kScales + 1, kTotal = kOther + 1;
    std::array<Group, kTotal + 1> groups;
    std::vector<std::string> ignored;
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      int group = kOther;
      if (auto it = kinds.find(name); it != kinds.end()) {
        group = static_cast<int>(it->second);
      } else if (absl::string_view weight = name;
                 absl::ConsumeSuffix(&weight, kScaleSuffix) && kinds.contains(weight)) {
        group = kScales;
      } else {
        ignored.push_back(name);
      }
      for (int i : {group, kTotal}) {
        ++groups[i].count;
        groups[i].bytes += tensor.num_bytes;
        groups[i].dtypes.insert(tensor.dtype);
      }
    }

    Line("\n{:<16}{:>8}{:>20}  {}", "tensors", "count", "bytes", "stored as");
    for (int i = 0; i <= kTotal; ++i) {
      if (groups[i].count == 0) continue;
      const char* name = i == kScales  ? "scales"
                         : i == kOther ? "other"
                         : i == kTotal ? "total"
                                       : TensorKindName(static_cast<TensorKind>(i));
      Line("  {:<14}{:>8}{:>20}  {}", name, Commas(groups[i].count), Commas(groups[i].bytes),
           absl::StrJoin(groups[i].dtypes, ", "));
    }
    std::sort(ignored.begin(), ignored.end());
    WriteNames("not part of the model", ignored);
    WriteNames("not in the index", checkpoint_.unindexed());
  }

  void WriteNames(const char* title, const std::vector<std::string>& names) {
    if (names.empty()) return;
    Line("{} {}:", names.size(), title);
    for (size_t i = 0; i < std::min(names.size(), kMaxListed); ++i) Line("  {}", Printable(names[i]));
    if (names.size() > kMaxListed) Line("  ...");
  }

  void WriteParameters() {
    const ParameterCounts counts = CountParameters(config_);
    Line("\nparameters {}, active per token {}", Commas(counts.main), Commas(counts.active));
    if (counts.mtp > 0) Line("MTP parameters {}, copies of embedding and head included", Commas(counts.mtp));
  }

  const ModelConfig& config_;
  const GenerationConfig& generation_;
  const Checkpoint& checkpoint_;
  std::string text_;
};

}  // namespace

std::string DescribeSampling(const SamplingParams& sampling) {
  const SamplingParams plain;
  std::vector<std::string> parts;
  const auto add = [&parts](const char* name, auto value, auto usual) {
    if (value != usual) parts.push_back(fmt::format("{} {}", name, value));
  };
  add("temperature", sampling.temperature, plain.temperature);
  add("top_p", sampling.top_p, plain.top_p);
  add("top_k", sampling.top_k, plain.top_k);
  add("min_p", sampling.min_p, plain.min_p);
  add("repetition_penalty", sampling.repetition_penalty, plain.repetition_penalty);
  return absl::StrJoin(parts, ", ");
}

absl::StatusOr<InspectReport> Inspect(const std::string& model_dir, bool deep) {
  absl::StatusOr<ModelConfig> config = ModelConfig::Load(model_dir);
  if (!config.ok()) return config.status();
  const absl::StatusOr<GenerationConfig> generation = GenerationConfig::Load(model_dir, config->vocab_size);
  if (!generation.ok()) return generation.status();
  absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(model_dir);
  if (!checkpoint.ok()) return checkpoint.status();
  InspectReport report;
  report.text = Report(*config, *generation, **checkpoint).Write();
  report.problems = ModelWeights::Problems(*config, **checkpoint, deep);
  return report;
}

}  // namespace cachalot
