// Generator: the one door through which every protocol asks for text.
#ifndef CACHALOT_SERVER_TEXT_GENERATOR_H_
#define CACHALOT_SERVER_TEXT_GENERATOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "server/logging.h"
#include "server/metrics.h"
#include "server/text/chat_template.h"
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

struct GeneratorOptions {
  std::optional<ChatTemplate> chat_template = {};  // without one, chats are refused
  // What the messages of a chat say may spell the template's markers (and any other added token) and so become them.
  // For trusted clients only: theirs is then the power to end a turn and to speak as somebody else.
  bool allow_special_tokens = false;
  SamplingParams sampling = {};  // of requests that say nothing: protocols begin with it
  Metrics* metrics = nullptr;    // told of every generation; must outlive the last sink
  RequestLog log = RequestLog::kNone;
};

// All methods may be called from any thread. `engine` must live until Stop() has returned, `tokenizer` and this object
// until the last sink has been called.
class Generator {
 public:
  // Without a tokenizer (nullptr) prompts are token ids and answers have no text.
  Generator(Engine* engine, const Tokenizer* tokenizer, GeneratorOptions options = {});
  ~Generator();

  // Checks a call and makes its token ids. InvalidArgument naming the field (see request_error.h) for values out of
  // range, a prompt that is empty, too long ("context_length_exceeded") or text without a tokenizer, a chat that cannot
  // be written (see ChatTemplate::Render) or without a template ("messages").
  absl::StatusOr<std::shared_ptr<const GeneratePlan>> Prepare(GenerateCall call) const;

  // Submits answer `choice` of a plan; answers with the same seed and different choices differ. The sink may be called
  // before this returns. ResourceExhausted when the queue is full, Unavailable when stopping: then `sink` is never
  // called.
  absl::StatusOr<std::shared_ptr<Generation>> Start(std::shared_ptr<const GeneratePlan> plan, uint32_t choice,
                                                    EventSink sink);

  // Token ids of text, as a prompt would have them. InvalidArgument ("prompt") for ill-formed UTF-8 or no tokenizer.
  absl::StatusOr<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special_tokens,
                                                bool match_special = true) const;
  // Token ids of a chat, as its prompt would have them; fails as Prepare does.
  absl::StatusOr<std::vector<int32_t>> Tokenize(const ChatPrompt& chat) const;

  // Text of token ids. InvalidArgument (`field`) for ids outside the vocabulary, text of more than `max_bytes` or no
  // tokenizer.
  absl::StatusOr<std::string> Detokenize(std::span<const int32_t> ids, std::string_view field, size_t max_bytes) const;

  // Ok while generations are started: the engine's health; Unavailable after BeginDrain() or Stop().
  absl::Status health() const;
  absl::Status engine_health() const;
  std::vector<EngineStats> rank_stats() const;
  // Engine::ResetPrefixCache; Unavailable after Stop().
  absl::Status ResetPrefixCache();
  // Generations whose last event has not been given out.
  int num_running() const;
  const ModelInfo& model() const { return model_; }
  const Tokenizer* tokenizer() const { return tokenizer_; }
  const GeneratorOptions& options() const { return options_; }

  // From now on nothing is started; what is in flight goes on.
  void BeginDrain();

  // From now on nothing is started and the engine is not touched any more: it may be destroyed, which ends what is in
  // flight.
  void Stop();

 private:
  class Gate;
  class LiveGeneration;

  absl::Status MakePrompt(GenerateCall* call, GeneratePlan* plan) const;
  absl::StatusOr<std::vector<int32_t>> TokenizeChat(const ChatPrompt& chat, ReasoningStart* reasoning) const;
  absl::Status CheckTextFits(std::string_view text, std::string_view field) const;
  absl::Status CheckPrompt(const std::vector<int32_t>& prompt, bool needs_room, std::string_view field) const;

  const std::shared_ptr<Gate> gate_;  // shared with generations, which may outlive everything else
  const ModelInfo model_;
  const Tokenizer* const tokenizer_;
  const GeneratorOptions options_;
};

// A seed for requests that bring none.
uint64_t RandomSeed();

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_GENERATOR_H_
