// generation_config.json: the fields that serving goes by.
#include "engine/model/generation_config.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "engine/model/config_fields.h"

namespace cachalot {
namespace {

// A number above 0.
void ReadPositive(const ConfigFields& fields, const char* name, double most, float* value) {
  if (!fields.Has(name)) return;
  *value = static_cast<float>(fields.Double(name, 0, most));
  if (!(*value > 0)) fields.Refuse(name, "a number above 0");
}

}  // namespace

absl::StatusOr<GenerationConfig> GenerationConfig::Load(const std::string& model_dir, int vocab_size) {
  GenerationConfig config;
  const std::string path = PathIn(model_dir, "generation_config.json");
  const absl::StatusOr<std::string> text = ReadConfigText(path);
  if (absl::IsNotFound(text.status())) return config;
  if (!text.ok()) return text.status();
  const absl::StatusOr<nlohmann::json> root = ParseConfigObject(*text, path);
  if (!root.ok()) return root.status();

  absl::Status status;
  const ConfigFields fields(&*root, path + ": ", &status);
  SamplingParams& sampling = config.sampling;
  config.eos_token_ids = fields.Ints("eos_token_id", 0, vocab_size - 1);
  sampling.temperature = static_cast<float>(fields.DoubleOr("temperature", sampling.temperature, 0, 2));
  ReadPositive(fields, "top_p", 1, &sampling.top_p);
  sampling.top_k = std::max(fields.IntOr("top_k", 0, -1, std::numeric_limits<int>::max()), 0);
  sampling.min_p = static_cast<float>(fields.DoubleOr("min_p", sampling.min_p, 0, 1));
  ReadPositive(fields, "repetition_penalty", std::numeric_limits<float>::max(), &sampling.repetition_penalty);
  if (!status.ok()) return status;
  return config;
}

}  // namespace cachalot
