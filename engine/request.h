// Request and Delta: what crosses the border between the server and the engine. Token ids only.
#ifndef CACHALOT_ENGINE_REQUEST_H_
#define CACHALOT_ENGINE_REQUEST_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace cachalot {

// How a request's tokens are drawn and when they end. The token at a position is a pure function of the logits and of
// (seed, choice, position): batching, chunking and preemption change no token.
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  int top_k = 0;             // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  uint64_t seed = 0;
  uint32_t choice = 0;  // index among the request's n answers
  int max_tokens = 16;  // 0: score the prompt only
  int min_tokens = 0;   // until so many are generated, no token that would end the answer is drawn, if any other can be
  bool ignore_eos = false;
  int logprobs = -1;                    // alternatives to report per generated token, 0..20; -1: no log-probabilities
  int prompt_logprobs = -1;             // the same per prompt token
  std::vector<int32_t> stop_token_ids;  // besides the model's end-of-sequence ids
  std::vector<std::pair<int32_t, float>> logit_bias;  // (token id, added to its logit before penalties); ids differ
};

struct Request {
  std::vector<int32_t> prompt;  // at least one token
  SamplingParams sampling;
  int priority = 0;                              // lower first; below 0 by a little: engine/schedule/admission.h
  std::string client;                            // whoever has the fewest running takes the next turn
  std::string cache_salt;                        // the prefix cache is shared by requests of the same salt only
  absl::Time deadline = absl::InfiniteFuture();  // past it the request ends with kError (DeadlineExceeded)
};

// Log-probability of a token under the raw logits, and the likeliest alternatives by falling log-probability.
struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0.0f;
  std::vector<std::pair<int32_t, float>> top;
};

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kError };

// Where a request's time went, and what it cost.
struct RequestTimes {
  absl::Duration queued;   // from Submit until a step first named it
  absl::Duration prefill;  // from then until its first token was committed
  absl::Duration decode;   // from then until its end
  int num_preemptions = 0;
};

// One step's news of one request.
struct Delta {
  Delta() = default;
  Delta(const Delta&) = default;
  Delta& operator=(const Delta&) = default;
  // NOTE: not inline: g++ 12 believes that whoever moves an empty InlinedVector reads what was never written.
  Delta(Delta&& other) noexcept;
  Delta& operator=(Delta&& other) noexcept;

  absl::InlinedVector<int32_t, 4> tokens;     // generated; the end-of-sequence token included when it ended the answer
  std::vector<TokenLogprob> logprobs;         // one per token, when asked for
  std::vector<TokenLogprob> prompt_logprobs;  // of prompt tokens 1, 2, ... in order, spread over several deltas
  FinishReason finish_reason = FinishReason::kNone;  // set in the last delta, exactly once
  int32_t stop_token = -1;                           // the token id that ended it, when kStop
  absl::Status error;                                // when kError
  int num_cached_tokens = 0;                         // of the prompt, that were found in the prefix cache
  RequestTimes times;                                // in the last delta
};

// Called from the engine's output thread, in order, until the delta with a finish reason. Must not block for long and
// must not call back into Submit; Cancel is allowed.
using DeltaSink = std::function<void(Delta)>;

using RequestId = uint64_t;

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_REQUEST_H_
