// Generator: the one door through which every protocol asks for text.
#ifndef CACHALOT_SERVER_TEXT_GENERATOR_H_
#define CACHALOT_SERVER_TEXT_GENERATOR_H_

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "server/text/generate.h"
#include "server/text/tokenizer.h"

namespace cachalot {

// A started generation. Methods may be called from any thread, also after the generation or the engine has ended.
class Generation {
 public:
  virtual ~Generation() = default;
  // The sink's last event comes soon, with kCancelled unless the answer ended otherwise first.
  virtual void Cancel() = 0;
};

// All methods may be called from any thread. `engine` must live until Stop() has returned, `tokenizer` and this object
// until the last sink has been called.
class Generator {
 public:
  // Without a tokenizer (nullptr) prompts are token ids and answers have no text.
  Generator(Engine* engine, const Tokenizer* tokenizer);
  ~Generator();

  // Checks a call and makes its token ids. InvalidArgument naming the field (see request_error.h) for values out of
  // range, a prompt that is empty, too long ("context_length_exceeded") or text without a tokenizer.
  absl::StatusOr<std::shared_ptr<const GeneratePlan>> Prepare(GenerateCall call) const;

  // Submits answer `choice` of a plan; answers with the same seed and different choices differ. The sink may be called
  // before this returns. ResourceExhausted when the queue is full, Unavailable when stopping: then `sink` is never
  // called.
  absl::StatusOr<std::shared_ptr<Generation>> Start(std::shared_ptr<const GeneratePlan> plan, uint32_t choice,
                                                    EventSink sink);

  // Token ids of text, as a prompt would have them. InvalidArgument ("prompt") for ill-formed UTF-8 or no tokenizer.
  absl::StatusOr<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special_tokens,
                                                bool match_special = true) const;

  // The engine's health; Unavailable after Stop().
  absl::Status health() const;
  const ModelInfo& model() const { return model_; }
  const Tokenizer* tokenizer() const { return tokenizer_; }

  // From now on nothing is started and the engine is not touched any more: it may be destroyed, which ends what is in
  // flight.
  void Stop();

 private:
  class Gate;
  class LiveGeneration;

  absl::Status CheckPrompt(const GeneratePlan& plan) const;

  const std::shared_ptr<Gate> gate_;  // shared with generations, which may outlive everything else
  const ModelInfo model_;
  const Tokenizer* const tokenizer_;
};

// A seed for requests that bring none.
uint64_t RandomSeed();

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_GENERATOR_H_
