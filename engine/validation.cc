// Validation of options and requests: messages for people, naming the field.
#include "engine/validation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_format.h"
#include "engine/schedule/sequence.h"
#include "kernels/ops_types.h"

namespace cachalot {
namespace {

template <typename... Args>
absl::Status Bad(const absl::FormatSpec<Args...>& format, const Args&... args) {
  return absl::InvalidArgumentError(absl::StrFormat(format, args...));
}

// The token ids that sampling parameters name.
absl::Status ValidateTokenIds(const SamplingParams& s, int vocab_size, const std::vector<int>& eos_token_ids) {
  for (int32_t token : s.stop_token_ids) {
    if (token < 0 || token >= vocab_size) {
      return Bad("stop_token_ids: token id %d is outside the vocabulary of %d", token, vocab_size);
    }
  }
  absl::flat_hash_set<int32_t> biased;
  for (const auto& [token, bias] : s.logit_bias) {
    if (token < 0 || token >= vocab_size) {
      return Bad("logit_bias: token id %d is outside the vocabulary of %d", token, vocab_size);
    }
    if (!biased.insert(token).second) return Bad("logit_bias: token id %d occurs twice", token);
    if (!(std::abs(bias) <= 100)) return Bad("logit_bias: found %g for token id %d, expected -100 to 100", bias, token);
  }
  const size_t num_biases = NumTokenBiases(s, eos_token_ids);
  if (num_biases > kMaxTokenBiases) {
    return Bad("logit_bias: %d tokens, with those that min_tokens holds back; expected at most %d", num_biases,
               kMaxTokenBiases);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateOptions(const EngineOptions& options) {
  const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return Bad("%s: found %d, expected %d to %d", name, value, low, high);
  };
  absl::Status status = within("max-model-len", options.max_model_len, 0, kMaxModelLen);
  status.Update(within("max-sequences", options.max_sequences, 1, kMaxSequences));
  status.Update(within("max-batch-tokens", options.max_batch_tokens, 1, kMaxBatchTokens));
  status.Update(within("speculative-tokens", options.speculative_tokens, 0, kMaxSpeculativeTokens));
  status.Update(within("max-waiting", options.max_waiting, 1, kMaxWaiting));
  status.Update(within("kv-cache-memory", options.kv_cache_bytes, 0, std::numeric_limits<int64_t>::max()));
  if (!(options.kv_cache_share >= 0 && options.kv_cache_share <= 1)) {
    status.Update(Bad("kv-cache-memory: found a share of %g, expected 0 to 1", options.kv_cache_share));
  }
  status.Update(within("threads", options.num_threads, 0, kMaxThreads));
  const std::array activations = {"auto", "f32", "fp8", "fp8-f32"};
  if (std::find(activations.begin(), activations.end(), options.activation) == activations.end()) {
    status.Update(absl::InvalidArgumentError(
        absl::StrFormat("activation: found \"%s\", expected auto, f32, fp8 or fp8-f32", options.activation)));
  }
  return status;
}

absl::Status ValidateRequest(const Request& request, const ModelInfo& model, const std::vector<int>& eos_token_ids) {
  const SamplingParams& s = request.sampling;
  if (request.prompt.empty()) return Bad("prompt: it has no tokens");
  for (int32_t token : request.prompt) {
    if (token < 0 || token >= model.vocab_size) {
      return Bad("prompt: token id %d is outside the vocabulary of %d", token, model.vocab_size);
    }
  }
  const int64_t num_tokens = static_cast<int64_t>(request.prompt.size());
  if (num_tokens + (s.max_tokens > 0 ? 1 : 0) > model.max_model_len) {
    return Bad("prompt: it has %d tokens, and the context of %d must hold prompt and answer", num_tokens,
               model.max_model_len);
  }
  if (!std::isfinite(s.temperature) || s.temperature < 0)
    return Bad("temperature: found %g, expected 0 or more", s.temperature);
  if (!(s.top_p > 0 && s.top_p <= 1)) return Bad("top_p: found %g, expected more than 0 and at most 1", s.top_p);
  if (!(s.min_p >= 0 && s.min_p <= 1)) return Bad("min_p: found %g, expected 0 to 1", s.min_p);
  if (s.top_k < 0) return Bad("top_k: found %d, expected 0 or more", s.top_k);
  if (!(std::abs(s.presence_penalty) <= 2))
    return Bad("presence_penalty: found %g, expected -2 to 2", s.presence_penalty);
  if (!(std::abs(s.frequency_penalty) <= 2))
    return Bad("frequency_penalty: found %g, expected -2 to 2", s.frequency_penalty);
  if (!(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0)) {
    return Bad("repetition_penalty: found %g, expected more than 0", s.repetition_penalty);
  }
  if (s.max_tokens < 0) return Bad("max_tokens: found %d, expected 0 or more", s.max_tokens);
  if (s.min_tokens < 0 || s.min_tokens > s.max_tokens) {
    return Bad("min_tokens: found %d, expected 0 to max_tokens, which is %d", s.min_tokens, s.max_tokens);
  }
  if (s.logprobs > kMaxTopLogprobs || s.prompt_logprobs > kMaxTopLogprobs) {
    return Bad("logprobs: found %d, expected at most %d", std::max(s.logprobs, s.prompt_logprobs), kMaxTopLogprobs);
  }
  return ValidateTokenIds(s, model.vocab_size, eos_token_ids);
}

}  // namespace cachalot
