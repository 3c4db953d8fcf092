// Field by field, with the names, defaults and types of OpenAI's API and vLLM's extensions to it.
#include "server/http/openai_request.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/http/json_fields.h"
#include "server/request_error.h"
#include "server/text/generator.h"

namespace cachalot {
namespace {

using nlohmann::json;

constexpr int kMaxInt = std::numeric_limits<int>::max();
constexpr int kMaxAnswers = 128;   // n
constexpr int kMaxChoices = 1024;  // prompts * n
constexpr char kPromptTypes[] =
    "must be a string, an array of strings, an array of token ids, or an array of arrays of token ids";

void ReadPrompts(JsonFields* fields, CompletionRequest* request) {
  const json* prompt = fields->Find("prompt");
  if (prompt == nullptr) {
    fields->Fail("prompt", "is missing");
    return;
  }
  if (prompt->is_string()) {
    request->prompts.emplace_back(*prompt->get_ptr<const std::string*>());
    return;
  }
  if (!prompt->is_array() || prompt->empty()) {
    fields->Fail("prompt", kPromptTypes);
    return;
  }
  if (prompt->front().is_number()) {
    if (std::vector<int32_t> ids; AppendTokenIds(*prompt, &ids)) {
      request->prompts.emplace_back(std::move(ids));
    } else {
      fields->Fail("prompt", kPromptTypes);
    }
    return;
  }
  const bool is_text = prompt->front().is_string();
  for (const json& item : *prompt) {
    std::vector<int32_t> ids;
    if (is_text && item.is_string()) {
      request->prompts.emplace_back(*item.get_ptr<const std::string*>());
    } else if (!is_text && AppendTokenIds(item, &ids)) {
      request->prompts.emplace_back(std::move(ids));
    } else {
      fields->Fail("prompt", kPromptTypes);
      return;
    }
  }
}

void ReadSampling(JsonFields* fields, SamplingParams* sampling) {
  fields->Read("temperature", &sampling->temperature);
  fields->Read("top_p", &sampling->top_p);
  if (fields->Read("top_k", -1, kMaxInt, &sampling->top_k)) sampling->top_k = std::max(sampling->top_k, 0);
  fields->Read("min_p", &sampling->min_p);
  fields->Read("presence_penalty", &sampling->presence_penalty);
  fields->Read("frequency_penalty", &sampling->frequency_penalty);
  fields->Read("repetition_penalty", &sampling->repetition_penalty);
  if (!fields->Read("seed", &sampling->seed)) sampling->seed = RandomSeed();
  fields->Read("max_tokens", 0, kMaxInt, &sampling->max_tokens);
  fields->Read("ignore_eos", &sampling->ignore_eos);
  fields->Read("stop_token_ids", &sampling->stop_token_ids);
}

// Fields that change the answer and that we do not have: refused unless they ask for nothing.
void RefuseUnsupported(JsonFields* fields, int n) {
  int best_of = n;
  if (fields->Read("best_of", 1, kMaxInt, &best_of) && best_of != n) {
    fields->Fail("best_of", "is not supported unless it equals n");
  }
  std::string suffix;
  if (fields->Read("suffix", &suffix) && !suffix.empty()) fields->Fail("suffix", "is not supported");
  const json* bias = fields->Find("logit_bias");
  if (bias != nullptr && !bias->empty()) fields->Fail("logit_bias", "is not supported");
  const json* format = fields->Find("response_format");
  const bool is_text = format != nullptr && format->is_object() && format->value("type", json()) == "text";
  if (format != nullptr && !is_text) fields->Fail("response_format", "is not supported");
  if (fields->Find("structured_outputs") != nullptr) fields->Fail("structured_outputs", "is not supported");
}

}  // namespace

absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body) {
  const absl::StatusOr<json> object = ParseJsonObject(body);
  if (!object.ok()) return object.status();
  JsonFields fields(*object);
  CompletionRequest request;
  fields.Read("model", &request.model);
  ReadPrompts(&fields, &request);
  ReadSampling(&fields, &request.call.sampling);
  fields.Read("logprobs", 0, 20, &request.call.sampling.logprobs);
  fields.ReadStrings("stop", &request.call.stop);
  fields.Read("echo", &request.call.echo);
  fields.Read("add_special_tokens", &request.call.add_special_tokens);
  fields.Read("n", 1, kMaxAnswers, &request.n);
  fields.Read("stream", &request.stream);
  fields.Read("return_token_ids", &request.return_token_ids);
  if (const json* options = fields.Find("stream_options"); options != nullptr) {
    if (!options->is_object()) {
      fields.Fail("stream_options", "must be an object");
    } else {
      JsonFields stream_fields(*options, "stream_options.");
      stream_fields.Read("include_usage", &request.include_usage);
      if (!stream_fields.status().ok()) return stream_fields.status();
    }
  }
  RefuseUnsupported(&fields, request.n);
  if (!fields.status().ok()) return fields.status();
  if (request.prompts.size() * request.n > kMaxChoices) {
    return FieldError("n", absl::StrCat("prompts times n may be at most ", kMaxChoices));
  }
  return request;
}

absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body) {
  const absl::StatusOr<json> object = ParseJsonObject(body);
  if (!object.ok()) return object.status();
  JsonFields fields(*object);
  TokenizeRequest request;
  fields.Read("model", &request.model);
  if (!fields.Read("prompt", &request.prompt)) fields.Fail("prompt", "is missing");
  fields.Read("add_special_tokens", &request.add_special_tokens);
  if (!fields.status().ok()) return fields.status();
  return request;
}

absl::StatusOr<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body) {
  const absl::StatusOr<json> object = ParseJsonObject(body);
  if (!object.ok()) return object.status();
  JsonFields fields(*object);
  DetokenizeRequest request;
  fields.Read("model", &request.model);
  if (!fields.Read("tokens", &request.tokens)) fields.Fail("tokens", "is missing");
  if (!fields.status().ok()) return fields.status();
  return request;
}

}  // namespace cachalot
