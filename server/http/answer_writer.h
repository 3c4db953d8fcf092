// AnswerWriter: answers of OpenAI's APIs as JSON, whole or as the events of a stream.
#ifndef CACHALOT_SERVER_HTTP_ANSWER_WRITER_H_
#define CACHALOT_SERVER_HTTP_ANSWER_WRITER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/text/generate.h"

namespace cachalot {

enum class AnswerKind : uint8_t { kCompletion, kChat };

// What the client asked to see.
struct AnswerView {
  AnswerKind kind = AnswerKind::kCompletion;
  bool stream = false;
  bool logprobs = false;
  bool token_ids = false;         // generated ones, and the prompt's
  bool include_usage = false;     // stream: usage in an event of its own at the end
  bool continuous_usage = false;  // stream: and in every event, its choice's as far as it got
};

// One choice of a whole answer: what its events said, one after the other (see AppendEvent).
struct AnswerChoice {
  GenerateEvent answer;
  const std::vector<int32_t>* prompt = nullptr;  // its token ids
};

// Immutable: const methods may be called from any thread.
class AnswerWriter {
 public:
  // `created` in seconds since 1970; `model` is the name that the client used.
  AnswerWriter(AnswerView view, std::string_view id, int64_t created, std::string_view model);

  // True if `event` would be seen by the client.
  bool IsVisible(const GenerateEvent& event) const;

  // Appends the server-sent events, usually one, that tell `event` of choice `index`. `prompt` is set in the first
  // event of a choice, which in a chat begins with the role; `usage` is what the choice has used so far.
  void AppendEvents(int index, const GenerateEvent& event, const std::vector<int32_t>* prompt, const Usage& usage,
                    std::string* out) const;

  // Appends a stream's end: usage of all choices where it was asked for, then [DONE].
  void AppendDone(const Usage& usage, std::string* out) const;

  std::string Whole(const std::vector<AnswerChoice>& choices, const Usage& usage) const;

 private:
  struct Chunk;
  void AppendChunk(const Chunk& chunk, const Usage& usage, std::string* out) const;
  void AppendChatEvents(int index, const GenerateEvent& event, const std::vector<int32_t>* prompt, const Usage& usage,
                        std::string* out) const;
  void AppendMessage(const GenerateEvent& answer, std::string* out) const;
  void AppendLogprobs(const std::vector<TokenScore>& scores, std::string* out) const;

  const AnswerView view_;
  std::string head_;  // {"id":...,"choices":[
};

// Appends what `from` says to `to`, as if both had been one event.
void AppendEvent(GenerateEvent from, GenerateEvent* to);

// "data: {data}\n\n".
std::string SseEvent(std::string_view data);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_ANSWER_WRITER_H_
