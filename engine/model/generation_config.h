// GenerationConfig: generation_config.json, where a checkpoint's makers say how its answers are drawn and end.
#ifndef CACHALOT_ENGINE_MODEL_GENERATION_CONFIG_H_
#define CACHALOT_ENGINE_MODEL_GENERATION_CONFIG_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"

namespace cachalot {

struct GenerationConfig {
  std::vector<int> eos_token_ids;
  // What requests that say nothing are drawn with: temperature, top_p, top_k, min_p and repetition_penalty where the
  // file has them. NOTE: do_sample is not looked at, as in vLLM: the published files leave it out or contradict it.
  SamplingParams sampling;

  // Nothing at all when there is no such file. InvalidArgument naming file, field, found and expected.
  static absl::StatusOr<GenerationConfig> Load(const std::string& model_dir, int vocab_size);
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_GENERATION_CONFIG_H_
