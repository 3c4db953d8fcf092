// Engine: a model that is served. Requests go in, deltas come out.
#ifndef CACHALOT_ENGINE_ENGINE_H_
#define CACHALOT_ENGINE_ENGINE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/options.h"
#include "engine/request.h"
#include "engine/stats.h"

namespace cachalot {

// What the engine must know of the tokenizer that it never sees.
struct TokenizerInfo {
  int valid_tokens = 0;                 // > 0: ids from there on have no text and are never sampled
  std::optional<int32_t> eos_token_id;  // ends answers, as those of config.json and generation_config.json do
};

// Payload of a status that is about one field of a request: the field's name.
inline constexpr char kFieldUrl[] = "cachalot/request-field";

// What Submit refuses whatever the prompt is, for those who must know before there is one. InvalidArgument with a
// message for people, what was found and what was expected, and the field as payload.
absl::Status ValidateSampling(const SamplingParams& sampling, const ModelInfo& model);

// All methods may be called from any thread.
class Engine {
 public:
  // Loads the checkpoint, makes the backend, the cache and every workspace, and runs one real step: when this returns,
  // the engine is ready. NotFound, InvalidArgument or Unimplemented for a checkpoint that cannot be served (one line
  // naming file, tensor, found and expected), ResourceExhausted when it does not fit.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                        const TokenizerInfo& tokenizer = {});

  virtual ~Engine() = default;  // stops: what is in flight ends with kError (Unavailable)

  // InvalidArgument (message for people, naming the field) for an empty prompt, ids outside the vocabulary, a prompt
  // that leaves no room in max_model_len, parameters out of range; ResourceExhausted when the queue is full;
  // Unavailable when stopping. Otherwise `sink` will be called until a delta with a finish reason.
  virtual absl::StatusOr<RequestId> Submit(Request request, DeltaSink sink) = 0;

  // The request ends with kCancelled unless it has already ended; unknown ids are ignored.
  virtual void Cancel(RequestId id) = 0;

  // Forgets all cached prefixes: requests that are submitted from now on are computed from their start.
  virtual void ResetPrefixCache() = 0;

  virtual std::vector<EngineStats> rank_stats() const = 0;  // of each rank
  EngineStats stats() const;                                // of all
  virtual const ModelInfo& model() const = 0;
  // Ok while steps complete; the fault once a rank is dead, and so all are.
  virtual absl::Status health() const = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_ENGINE_H_
