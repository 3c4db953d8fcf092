// The JSON of choices, deltas, log-probabilities and usage. Log-probabilities are built as values: they are rare.
#include "server/http/answer_writer.h"

#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/http/openai_error.h"
#include "server/text/json_text.h"
#include "server/text/utf8.h"

namespace cachalot {
namespace {

using nlohmann::ordered_json;

constexpr double kLeastLogprob = -9999.0;  // JSON has no infinity

double Finite(float logprob) { return std::isfinite(logprob) ? logprob : kLeastLogprob; }

const char* FinishReasonJson(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "\"stop\"";
    case FinishReason::kLength: return "\"length\"";
    case FinishReason::kCancelled: return "\"abort\"";
    default: return "null";
  }
}

// A token's text, or its bytes as OpenAI writes those that are not whole characters: "bytes:\xe2\x96" in completions,
// "\xe2\x96" in chats.
std::string TokenLabel(const std::string& bytes, std::string_view prefix) {
  if (!FindInvalidUtf8(bytes).has_value()) return bytes;
  std::string label(prefix);
  for (const char byte : bytes) absl::StrAppendFormat(&label, "\\x%02x", static_cast<uint8_t>(byte));
  return label;
}

// {label: log-probability} of the alternatives and of the token itself.
ordered_json TopJson(const TokenScore& score) {
  if (!score.logprob.has_value()) return nullptr;
  ordered_json top = ordered_json::object();
  for (const auto& [bytes, logprob] : score.top) top.emplace(TokenLabel(bytes, "bytes:"), Finite(logprob));
  top.emplace(TokenLabel(score.bytes, "bytes:"), Finite(*score.logprob));
  return top;
}

ordered_json CompletionLogprobs(const std::vector<TokenScore>& scores) {
  ordered_json tokens = ordered_json::array(), logprobs = tokens, tops = tokens, offsets = tokens;
  for (const TokenScore& score : scores) {
    tokens.push_back(TokenLabel(score.bytes, "bytes:"));
    logprobs.push_back(score.logprob.has_value() ? ordered_json(Finite(*score.logprob)) : ordered_json(nullptr));
    tops.push_back(TopJson(score));
    offsets.push_back(score.text_offset);
  }
  ordered_json json;
  json["tokens"] = std::move(tokens);
  json["token_logprobs"] = std::move(logprobs);
  json["top_logprobs"] = std::move(tops);
  json["text_offset"] = std::move(offsets);
  return json;
}

ordered_json ChatLogprob(const std::string& bytes, float logprob) {
  ordered_json json;
  json["token"] = TokenLabel(bytes, "");
  json["logprob"] = Finite(logprob);
  json["bytes"] = std::vector<uint8_t>(bytes.begin(), bytes.end());
  return json;
}

ordered_json ChatLogprobs(const std::vector<TokenScore>& scores) {
  ordered_json content = ordered_json::array();
  for (const TokenScore& score : scores) {
    ordered_json top = ordered_json::array();
    for (const auto& [bytes, logprob] : score.top) top.push_back(ChatLogprob(bytes, logprob));
    ordered_json token = ChatLogprob(score.bytes, score.logprob.value_or(0));
    token["top_logprobs"] = std::move(top);
    content.push_back(std::move(token));
  }
  ordered_json json;
  json["content"] = std::move(content);
  json["refusal"] = nullptr;
  return json;
}

void AppendIds(std::string_view key, const std::vector<int32_t>& ids, std::string* out) {
  absl::StrAppend(out, ",\"", absl::string_view(key.data(), key.size()), "\":[");
  for (size_t i = 0; i < ids.size(); ++i) absl::StrAppend(out, i == 0 ? "" : ",", ids[i]);
  out->push_back(']');
}

void AppendUsage(const Usage& usage, std::string* out) {
  absl::StrAppend(out, ",\"usage\":{\"prompt_tokens\":", usage.prompt_tokens,
                  ",\"completion_tokens\":", usage.completion_tokens,
                  ",\"total_tokens\":", usage.prompt_tokens + usage.completion_tokens,
                  ",\"prompt_tokens_details\":{\"cached_tokens\":", usage.cached_tokens, "}");
  // DeepSeek's names for it.
  absl::StrAppend(out, ",\"prompt_cache_hit_tokens\":", usage.cached_tokens,
                  ",\"prompt_cache_miss_tokens\":", usage.prompt_tokens - usage.cached_tokens, "}");
}

}  // namespace

// What one event of a stream says. Either `text` with its field, or `fields`.
struct AnswerWriter::Chunk {
  int index = 0;
  const char* fields = "";               // of the delta, before the text: "\"role\":\"assistant\",\"content\":\"\""
  const char* text_field = "";           // "content"
  std::string_view text;                 // when there is a field for it
  const GenerateEvent* event = nullptr;  // whose log-probabilities and ids this chunk has; may be null
  const std::vector<int32_t>* prompt = nullptr;
  FinishReason finish_reason = FinishReason::kNone;
};

AnswerWriter::AnswerWriter(AnswerView view, std::string_view id, int64_t created, std::string_view model)
    : view_(view) {
  const bool is_chat = view.kind == AnswerKind::kChat;
  head_ = "{\"id\":";
  AppendJsonString(id, &head_);
  absl::StrAppend(&head_, ",\"object\":\"",
                  !is_chat      ? "text_completion"
                  : view.stream ? "chat.completion.chunk"
                                : "chat.completion",
                  "\",\"created\":", created, ",\"model\":");
  AppendJsonString(model, &head_);
  head_ += ",\"choices\":[";
}

bool AnswerWriter::IsVisible(const GenerateEvent& event) const {
  return !event.text.empty() || !event.reasoning.empty() || (view_.logprobs && !event.scores.empty()) ||
         (view_.token_ids && !event.tokens.empty()) || event.finish_reason != FinishReason::kNone;
}

void AnswerWriter::AppendLogprobs(const std::vector<TokenScore>& scores, std::string* out) const {
  *out += Dump(view_.kind == AnswerKind::kChat ? ChatLogprobs(scores) : CompletionLogprobs(scores));
}

void AnswerWriter::AppendChunk(const Chunk& chunk, const Usage& usage, std::string* out) const {
  const bool is_chat = view_.kind == AnswerKind::kChat;
  absl::StrAppend(out, "data: ", head_, "{\"index\":", chunk.index, is_chat ? ",\"delta\":{" : ",", chunk.fields);
  if (*chunk.text_field != '\0') {
    absl::StrAppend(out, "\"", chunk.text_field, "\":");
    AppendJsonString(chunk.text, out);
  }
  absl::StrAppend(out, is_chat ? "}" : "", ",\"logprobs\":");
  if (view_.logprobs && chunk.event != nullptr && !chunk.event->scores.empty()) {
    AppendLogprobs(chunk.event->scores, out);
  } else {
    *out += "null";
  }
  absl::StrAppend(out, ",\"finish_reason\":", FinishReasonJson(chunk.finish_reason));
  if (view_.token_ids) {
    if (chunk.event != nullptr) AppendIds("token_ids", chunk.event->tokens, out);
    if (chunk.prompt != nullptr) AppendIds("prompt_token_ids", *chunk.prompt, out);
  }
  *out += "}]";
  if (view_.continuous_usage) {
    AppendUsage(usage, out);
  } else if (view_.include_usage) {
    *out += ",\"usage\":null";
  }
  *out += "}\n\n";
}

void AnswerWriter::AppendEvents(int index, const GenerateEvent& event, const std::vector<int32_t>* prompt,
                                const Usage& usage, std::string* out) const {
  if (view_.kind == AnswerKind::kChat) return AppendChatEvents(index, event, prompt, usage, out);
  AppendChunk({.index = index,
               .text_field = "text",
               .text = event.text,
               .event = &event,
               .prompt = prompt,
               .finish_reason = event.finish_reason},
              usage, out);
}

// The role comes with the first token, not before: clients time the first chunk they see. The finish reason has a chunk
// of its own, with an empty delta.
void AnswerWriter::AppendChatEvents(int index, const GenerateEvent& event, const std::vector<int32_t>* prompt,
                                    const Usage& usage, std::string* out) const {
  if (prompt != nullptr) {
    AppendChunk({.index = index, .fields = "\"role\":\"assistant\",\"content\":\"\"", .text = "", .prompt = prompt},
                usage, out);
  }
  const GenerateEvent* details = &event;  // with the first chunk that follows
  if (!event.reasoning.empty()) {
    AppendChunk({.index = index,
                 .text_field = "reasoning_content",
                 .text = event.reasoning,
                 .event = std::exchange(details, nullptr)},
                usage, out);
  }
  const bool has_details =
      details != nullptr && ((view_.logprobs && !event.scores.empty()) || (view_.token_ids && !event.tokens.empty()));
  if (!event.text.empty() || has_details) {
    AppendChunk({.index = index, .text_field = "content", .text = event.text, .event = details}, usage, out);
  }
  if (event.finish_reason != FinishReason::kNone) {
    AppendChunk({.index = index, .text = "", .finish_reason = event.finish_reason}, usage, out);
  }
}

void AnswerWriter::AppendDone(const Usage& usage, std::string* out) const {
  if (view_.include_usage) {
    absl::StrAppend(out, "data: ", head_, "]");
    AppendUsage(usage, out);
    *out += "}\n\n";
  }
  *out += "data: [DONE]\n\n";
}

void AnswerWriter::AppendMessage(const GenerateEvent& answer, std::string* out) const {
  if (view_.kind == AnswerKind::kCompletion) {
    *out += ",\"text\":";
    return AppendJsonString(answer.text, out);
  }
  *out += ",\"message\":{\"role\":\"assistant\",\"content\":";
  AppendJsonString(answer.text, out);
  if (!answer.reasoning.empty()) {
    *out += ",\"reasoning_content\":";
    AppendJsonString(answer.reasoning, out);
  }
  *out += ",\"refusal\":null}";
}

std::string AnswerWriter::Whole(const std::vector<AnswerChoice>& choices, const Usage& usage) const {
  std::string out = head_;
  for (size_t i = 0; i < choices.size(); ++i) {
    const GenerateEvent& answer = choices[i].answer;
    absl::StrAppend(&out, i == 0 ? "" : ",", "{\"index\":", i);
    AppendMessage(answer, &out);
    out += ",\"logprobs\":";
    if (view_.logprobs) {
      AppendLogprobs(answer.scores, &out);
    } else {
      out += "null";
    }
    absl::StrAppend(&out, ",\"finish_reason\":", FinishReasonJson(answer.finish_reason));
    if (view_.token_ids) {
      AppendIds("token_ids", answer.tokens, &out);
      if (choices[i].prompt != nullptr) AppendIds("prompt_token_ids", *choices[i].prompt, &out);
    }
    out += "}";
  }
  out += "]";
  AppendUsage(usage, &out);
  out += "}";
  return out;
}

void AppendEvent(GenerateEvent from, GenerateEvent* to) {
  if (from.takes_back_reasoning) to->reasoning.clear();
  to->text += from.text;
  to->reasoning += from.reasoning;
  to->tokens.insert(to->tokens.end(), from.tokens.begin(), from.tokens.end());
  to->scores.insert(to->scores.end(), std::make_move_iterator(from.scores.begin()),
                    std::make_move_iterator(from.scores.end()));
  if (from.finish_reason == FinishReason::kNone) return;
  to->finish_reason = from.finish_reason;
  to->stop_string = std::move(from.stop_string);
  to->error = std::move(from.error);
  to->usage = from.usage;
}

std::string SseEvent(std::string_view data) {
  return absl::StrCat("data: ", absl::string_view(data.data(), data.size()), "\n\n");
}

}  // namespace cachalot
