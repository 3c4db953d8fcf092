// The JSON of choices, log-probabilities and usage.
#include "server/http/openai_response.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/text/utf8.h"

namespace cachalot {
namespace {

using nlohmann::ordered_json;

constexpr double kLeastLogprob = -9999.0;  // JSON has no infinity

double Finite(float logprob) { return std::isfinite(logprob) ? logprob : kLeastLogprob; }

ordered_json FinishReasonJson(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled: return "abort";
    default: return nullptr;
  }
}

// {label: log-probability} of the alternatives and of the token itself.
ordered_json TopJson(const TokenScore& score) {
  if (!score.logprob.has_value()) return nullptr;
  ordered_json top = ordered_json::object();
  for (const auto& [bytes, logprob] : score.top) top.emplace(TokenLabel(bytes), Finite(logprob));
  top.emplace(TokenLabel(score.bytes), Finite(*score.logprob));
  return top;
}

ordered_json LogprobsJson(const std::vector<TokenScore>& scores) {
  ordered_json tokens = ordered_json::array(), logprobs = tokens, tops = tokens, offsets = tokens;
  for (const TokenScore& score : scores) {
    tokens.push_back(TokenLabel(score.bytes));
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

}  // namespace

ordered_json PartJson(const CompletionPart& part, CompletionView view) {
  ordered_json json;
  json["index"] = part.index;
  json["text"] = part.text;
  json["logprobs"] = view.logprobs ? LogprobsJson(part.scores) : ordered_json(nullptr);
  json["finish_reason"] = FinishReasonJson(part.finish_reason);
  if (view.token_ids) {
    json["token_ids"] = part.tokens;
    if (part.prompt != nullptr) json["prompt_token_ids"] = *part.prompt;
  }
  return json;
}

ordered_json UsageJson(const Usage& usage) {
  ordered_json json;
  json["prompt_tokens"] = usage.prompt_tokens;
  json["completion_tokens"] = usage.completion_tokens;
  json["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  return json;
}

ordered_json CompletionJson(const CompletionHeader& header, ordered_json choices) {
  ordered_json json;
  json["id"] = header.id;
  json["object"] = "text_completion";
  json["created"] = header.created;
  json["model"] = header.model;
  json["choices"] = std::move(choices);
  return json;
}

std::string TokenLabel(const std::string& bytes) {
  if (!FindInvalidUtf8(bytes).has_value()) return bytes;
  std::string label = "bytes:";
  for (const char byte : bytes) absl::StrAppendFormat(&label, "\\x%02x", static_cast<uint8_t>(byte));
  return label;
}

std::string SseEvent(std::string_view data) {
  return absl::StrCat("data: ", absl::string_view(data.data(), data.size()), "\n\n");
}

}  // namespace cachalot
