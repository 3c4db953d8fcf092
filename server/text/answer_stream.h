// AnswerStream: one answer's deltas to events: characters, stop strings, reasoning, offsets, log-probabilities, usage.
#ifndef CACHALOT_SERVER_TEXT_ANSWER_STREAM_H_
#define CACHALOT_SERVER_TEXT_ANSWER_STREAM_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "engine/request.h"
#include "server/text/detokenizer.h"
#include "server/text/generate.h"
#include "server/text/reasoning.h"
#include "server/text/stop_strings.h"
#include "server/text/tokenizer.h"

namespace cachalot {

// For one thread at a time.
class AnswerStream {
 public:
  // Without a tokenizer (nullptr) events carry token ids and no text. `tokenizer` must outlive this.
  AnswerStream(std::shared_ptr<const GeneratePlan> plan, const Tokenizer* tokenizer);

  // The event of the engine's next delta. REQUIRES: !ended().
  GenerateEvent Next(Delta delta);

  // The last event has been returned. It comes before the engine's last delta when a stop string ended the answer: the
  // request is then to be cancelled and what it still sends ignored.
  bool ended() const { return ended_; }

 private:
  void AppendPrompt(GenerateEvent* event);
  void AppendPromptScore(const TokenLogprob& logprob, GenerateEvent* event);
  void AppendText(const std::string& piece, GenerateEvent* event);
  void AppendAnswer(std::string_view text, bool is_last, GenerateEvent* event);
  void Finish(FinishReason reason, GenerateEvent* event);
  TokenScore Score(const TokenLogprob& logprob) const;
  std::string TokenText(int32_t token) const;

  std::shared_ptr<const GeneratePlan> plan_;
  const Tokenizer* tokenizer_;
  std::optional<Detokenizer> prompt_detokenizer_, detokenizer_;  // none without a tokenizer
  StopStrings stops_;
  ReasoningSplitter reasoning_;
  size_t prompt_idx_ = 0;       // prompt tokens scored so far
  int64_t num_characters_ = 0;  // of the answer up to the next token to be scored
  Usage usage_;
  bool started_ = false, ended_ = false;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_ANSWER_STREAM_H_
