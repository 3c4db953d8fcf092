// Deltas to events: prompt echo first, then token by token through detokenizer, stop strings and reasoning.
#include "server/text/answer_stream.h"

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

int64_t CountCharacters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(), [](char byte) { return (byte & 0xC0) != 0x80; });
}

// Special tokens that are text all the same: the markers of reasoning, for an answer that may have them. Some
// tokenizers list them as special, DeepSeek's as ordinary added tokens.
std::vector<int32_t> ShownTokens(const GeneratePlan& plan, const Tokenizer& tokenizer) {
  std::vector<int32_t> shown;
  if (plan.reasoning == ReasoningStart::kNever) return shown;
  for (const std::string_view marker : {kThinkOpen, kThinkClose}) {
    if (const std::optional<int32_t> id = tokenizer.TokenToId(marker)) shown.push_back(*id);
  }
  return shown;
}

}  // namespace

AnswerStream::AnswerStream(std::shared_ptr<const GeneratePlan> plan, const Tokenizer* tokenizer)
    : plan_(std::move(plan)), tokenizer_(tokenizer), stops_(plan_->stop), reasoning_(plan_->reasoning) {
  if (tokenizer_ != nullptr) {
    prompt_detokenizer_.emplace(*tokenizer_, /*skip_special=*/false);
    detokenizer_.emplace(*tokenizer_, plan_->skip_special_tokens, ShownTokens(*plan_, *tokenizer_));
  }
  usage_.prompt_tokens = static_cast<int64_t>(plan_->prompt.size());
}

GenerateEvent AnswerStream::Next(Delta delta) {
  CHECK(!ended_);
  GenerateEvent event;
  event.usage.cached_tokens = usage_.cached_tokens = delta.num_cached_tokens;
  if (!std::exchange(started_, true) && plan_->echo) AppendPrompt(&event);
  for (const TokenLogprob& logprob : delta.prompt_logprobs) AppendPromptScore(logprob, &event);

  const bool has_scores = delta.logprobs.size() == delta.tokens.size();
  for (size_t i = 0; i < delta.tokens.size() && stops_.hit() == nullptr; ++i) {
    const int32_t token = delta.tokens[i];
    event.tokens.push_back(token);
    ++usage_.completion_tokens;
    if (has_scores) event.scores.push_back(Score(delta.logprobs[i]));
    const bool ends_answer =
        delta.finish_reason == FinishReason::kStop && i + 1 == delta.tokens.size() && token == delta.stop_token;
    const bool is_text = !ends_answer || plan_->include_stop;
    if (is_text && detokenizer_.has_value()) AppendText(detokenizer_->Push(token), &event);
  }

  // An incomplete character at the end can still complete a stop string that holds U+FFFD.
  const bool is_last = delta.finish_reason != FinishReason::kNone;
  if (is_last && stops_.hit() == nullptr && detokenizer_.has_value()) AppendText(detokenizer_->Flush(), &event);
  if (stops_.hit() != nullptr) {
    AppendAnswer(plan_->include_stop ? *stops_.hit() : "", /*is_last=*/true, &event);
    event.stop_string = *stops_.hit();
    Finish(FinishReason::kStop, &event);
  } else if (is_last) {
    AppendAnswer(stops_.Flush(), /*is_last=*/true, &event);
    event.error = std::move(delta.error);
    Finish(delta.finish_reason, &event);
  }
  return event;
}

void AnswerStream::AppendPrompt(GenerateEvent* event) {
  if (tokenizer_ != nullptr) {
    const std::span<const int32_t> written = std::span(plan_->prompt).subspan(plan_->num_added);
    event->text += tokenizer_->Decode(written, /*skip_special=*/false);
  }
  const bool is_scored = plan_->sampling.prompt_logprobs >= 0;
  if (is_scored) {
    AppendPromptScore({.token = plan_->prompt[0], .top = {}}, event);
  } else {
    num_characters_ = CountCharacters(event->text);
  }
}

void AnswerStream::AppendPromptScore(const TokenLogprob& logprob, GenerateEvent* event) {
  if (prompt_idx_ >= plan_->prompt.size()) return;
  const bool is_first = prompt_idx_ == 0, is_added = prompt_idx_ < static_cast<size_t>(plan_->num_added);
  TokenScore score = Score(logprob);
  if (is_first) score.logprob.reset();
  event->scores.push_back(std::move(score));
  ++prompt_idx_;
  if (!prompt_detokenizer_.has_value()) return;
  if (!is_added) num_characters_ += CountCharacters(prompt_detokenizer_->Push(logprob.token));
  if (prompt_idx_ == plan_->prompt.size()) num_characters_ += CountCharacters(prompt_detokenizer_->Flush());
}

void AnswerStream::AppendText(const std::string& piece, GenerateEvent* event) {
  num_characters_ += CountCharacters(piece);
  const bool may_stop = usage_.completion_tokens > plan_->sampling.min_tokens;
  AppendAnswer(stops_.Push(piece, may_stop), /*is_last=*/false, event);
}

void AnswerStream::AppendAnswer(std::string_view text, bool is_last, GenerateEvent* event) {
  ReasoningText out{.reasoning = std::move(event->reasoning), .content = std::move(event->text)};
  reasoning_.Push(text, &out);
  if (is_last) reasoning_.Flush(&out);
  if (out.takes_back) out.reasoning.clear();
  event->takes_back_reasoning = out.takes_back;
  event->reasoning = std::move(out.reasoning);
  event->text = std::move(out.content);
}

void AnswerStream::Finish(FinishReason reason, GenerateEvent* event) {
  ended_ = true;
  event->finish_reason = reason;
  event->usage = usage_;
}

TokenScore AnswerStream::Score(const TokenLogprob& logprob) const {
  TokenScore score{.token = logprob.token,
                   .bytes = TokenText(logprob.token),
                   .logprob = logprob.logprob,
                   .top = {},
                   .text_offset = num_characters_};
  score.top.reserve(logprob.top.size());
  for (const auto& [token, value] : logprob.top) score.top.emplace_back(TokenText(token), value);
  return score;
}

std::string AnswerStream::TokenText(int32_t token) const {
  if (tokenizer_ == nullptr || !tokenizer_->has_token(token)) return absl::StrCat("token_id:", token);
  return tokenizer_->TokenBytes(token);
}

}  // namespace cachalot
