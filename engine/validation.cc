// Validation of options and requests: messages for people, naming the field.
#include "engine/validation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/engine.h"
#include "engine/schedule/sequence.h"
#include "kernels/ops_types.h"
#include "kernels/socket.h"

namespace cachalot {
namespace {

absl::Status BadOption(const char* name, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", what));
}

template <typename... Args>
absl::Status Bad(const char* field, const absl::FormatSpec<Args...>& format, const Args&... args) {
  absl::Status status = absl::InvalidArgumentError(absl::StrCat(field, ": ", absl::StrFormat(format, args...)));
  status.SetPayload(kFieldUrl, absl::Cord(field));
  return status;
}

absl::Status CheckRange(const char* field, float value, float low, float high) {
  if (value >= low && value <= high) return absl::OkStatus();  // false for NaN
  return Bad(field, "found %g, expected %g to %g", value, low, high);
}

// The token ids that sampling parameters name.
absl::Status ValidateTokenIds(const SamplingParams& s, const ModelInfo& model) {
  for (int32_t token : s.stop_token_ids) {
    if (token >= 0 && token < model.vocab_size) continue;
    return Bad("stop_token_ids", "token id %d is outside the vocabulary of %d", token, model.vocab_size);
  }
  absl::flat_hash_set<int32_t> biased;
  for (const auto& [token, bias] : s.logit_bias) {
    if (token < 0 || token >= model.vocab_size) {
      return Bad("logit_bias", "token id %d is outside the vocabulary of %d", token, model.vocab_size);
    }
    if (!biased.insert(token).second) return Bad("logit_bias", "token id %d occurs twice", token);
    if (!(std::abs(bias) <= 100))
      return Bad("logit_bias", "found %g for token id %d, expected -100 to 100", bias, token);
  }
  const size_t num_biases = NumTokenBiases(s, model.eos_token_ids);
  if (num_biases <= kMaxTokenBiases) return absl::OkStatus();
  return Bad("logit_bias", "%d tokens, with those that min_tokens holds back; expected at most %d", num_biases,
             kMaxTokenBiases);
}

}  // namespace

absl::Status ValidateOptions(const EngineOptions& options) {
  const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return BadOption(name, absl::StrFormat("found %d, expected %d to %d", value, low, high));
  };
  absl::Status status = within("max-model-len", options.max_model_len, 0, kMaxModelLen);
  status.Update(within("max-sequences", options.max_sequences, 1, kMaxSequences));
  status.Update(within("max-batch-tokens", options.max_batch_tokens, 0, kMaxBatchTokens));
  status.Update(within("speculative-tokens", options.speculative_tokens, 0, kMaxSpeculativeTokens));
  status.Update(within("max-waiting", options.max_waiting, 1, kMaxWaiting));
  status.Update(within("kv-cache-memory", options.kv_cache_bytes, 0, std::numeric_limits<int64_t>::max()));
  if (!(options.kv_cache_share >= 0 && options.kv_cache_share <= 1)) {
    const std::string what = absl::StrFormat("found a share of %g, expected 0 to 1", options.kv_cache_share);
    status.Update(BadOption("kv-cache-memory", what));
  }
  status.Update(within("ranks", options.num_ranks, 1, kMaxRanks));
  status.Update(within("redundant-experts", options.num_redundant_experts, 0, kMaxRedundantExperts));
  status.Update(within("nodes", options.num_nodes, 1, kMaxNodes));
  status.Update(within("node-rank", options.node_rank, 0, std::max(options.num_nodes - 1, 0)));
  status.Update(within("join-timeout", options.join_timeout_seconds, 1, kMaxJoinTimeout));
  if (options.num_nodes > 1) {
    const auto leader = SplitAddress(options.leader);
    if (!leader.ok()) status.Update(BadOption("leader", std::string(leader.status().message())));
    if (leader.ok() && leader->second == "0")
      status.Update(BadOption("leader", "found port 0, expected one to meet at"));
    if (options.device == "cuda") status.Update(BadOption("nodes", "found more than 1, expected 1 on the GPU"));
  }
  status.Update(within("threads", options.num_threads, 0, kMaxThreads));
  const std::array activations = {"auto", "f32", "fp8", "fp8-f32"};
  if (std::find(activations.begin(), activations.end(), options.activation) == activations.end()) {
    const std::string what = absl::StrFormat("found \"%s\", expected auto, f32, fp8 or fp8-f32", options.activation);
    status.Update(BadOption("activation", what));
  }
  return status;
}

absl::Status ValidateSampling(const SamplingParams& s, const ModelInfo& model) {
  for (const absl::Status& status : {CheckRange("temperature", s.temperature, 0, 2), CheckRange("min_p", s.min_p, 0, 1),
                                     CheckRange("presence_penalty", s.presence_penalty, -2, 2),
                                     CheckRange("frequency_penalty", s.frequency_penalty, -2, 2)}) {
    if (!status.ok()) return status;
  }
  if (!(s.top_p > 0 && s.top_p <= 1)) return Bad("top_p", "found %g, expected more than 0 and at most 1", s.top_p);
  if (s.top_k < 0) return Bad("top_k", "found %d, expected 1 or more, or 0 or -1 for all tokens", s.top_k);
  if (!(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0)) {
    return Bad("repetition_penalty", "found %g, expected more than 0", s.repetition_penalty);
  }
  if (s.max_tokens < 0) return Bad("max_tokens", "found %d, expected 0 or more", s.max_tokens);
  if (s.min_tokens < 0 || s.min_tokens > s.max_tokens) {
    return Bad("min_tokens", "found %d, expected 0 to max_tokens, which is %d", s.min_tokens, s.max_tokens);
  }
  for (const int logprobs : {s.logprobs, s.prompt_logprobs}) {
    if (logprobs < -1 || logprobs > kMaxTopLogprobs) {
      return Bad("logprobs", "found %d, expected 0 to %d", logprobs, kMaxTopLogprobs);
    }
  }
  return ValidateTokenIds(s, model);
}

absl::Status ValidateRequest(const Request& request, const ModelInfo& model) {
  if (request.prompt.empty()) return Bad("prompt", "it has no tokens");
  for (int32_t token : request.prompt) {
    if (token >= 0 && token < model.vocab_size) continue;
    return Bad("prompt", "token id %d is outside the vocabulary of %d", token, model.vocab_size);
  }
  const int64_t num_tokens = static_cast<int64_t>(request.prompt.size());
  if (num_tokens + (request.sampling.max_tokens > 0 ? 1 : 0) > model.max_model_len) {
    return Bad("prompt", "it has %d tokens, and the context of %d must hold prompt and answer", num_tokens,
               model.max_model_len);
  }
  return ValidateSampling(request.sampling, model);
}

}  // namespace cachalot
