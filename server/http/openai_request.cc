// Field by field, with the names, defaults and types of OpenAI's API and vLLM's extensions to it.
#include "server/http/openai_request.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http/chat_messages.h"
#include "server/http/json_fields.h"
#include "server/request_error.h"
#include "server/text/generator.h"

namespace cachalot {
namespace {

using nlohmann::json;

constexpr int kMaxInt = std::numeric_limits<int>::max();
constexpr int kMaxAnswers = 128;   // n
constexpr int kMaxChoices = 1024;  // prompts * n
// Of other servers: fields that constrain or change an answer.
constexpr const char* kUnsupported[] = {"structured_outputs",
                                        "chat_template",
                                        "guided_json",
                                        "guided_regex",
                                        "guided_choice",
                                        "guided_grammar",
                                        "structural_tag",
                                        "allowed_token_ids",
                                        "bad_words",
                                        "prompt_logprobs",
                                        "use_beam_search",
                                        "length_penalty",
                                        "truncate_prompt_tokens",
                                        "documents",
                                        "regex",
                                        "ebnf",
                                        "json_schema",
                                        "logits_processors"};
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
  if (prompt->size() > kMaxChoices) {
    fields->Fail("prompt", absl::StrCat("may hold at most ", kMaxChoices, " prompts"));
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

void ReadLogitBias(JsonFields* fields, SamplingParams* sampling) {
  const json* bias = fields->Find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) {
    fields->Fail("logit_bias", "must be an object of numbers by token id");
    return;
  }
  for (const auto& [key, value] : bias->items()) {
    int32_t token = 0;
    if (!absl::SimpleAtoi(key, &token) || !value.is_number()) {
      fields->Fail("logit_bias", "must be an object of numbers by token id");
      return;
    }
    sampling->logit_bias.emplace_back(token, static_cast<float>(value.get<double>()));
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
  // -1 as vLLM has it. NOTE: to nlohmann 2^64 - 1 is equal to it.
  const json* seed = fields->Find("seed");
  const bool is_none = seed == nullptr || (*seed == -1 && !seed->is_number_unsigned());
  if (!fields->Read("seed", &sampling->seed) || is_none) sampling->seed = RandomSeed();
  fields->Read("min_tokens", 0, kMaxInt, &sampling->min_tokens);
  fields->Read("ignore_eos", &sampling->ignore_eos);
  fields->Read("stop_token_ids", &sampling->stop_token_ids);
  ReadLogitBias(fields, sampling);
}

// Null, false, nothing, or an object of such.
bool AsksNothing(const json& value) {
  if (value.is_object()) return std::all_of(value.begin(), value.end(), AsksNothing);
  return value.is_null() || value == json(false) || value == json("") || (value.is_array() && value.empty());
}

// Besides that, what leaves the answer as it is: clients that know a field send it with its default.
bool IsNeutral(std::string_view name, const json& value) {
  if (name == "length_penalty") return value == 1;  // and so is 1.0
  if (name == "truncate_prompt_tokens") return value == -1;
  if (name == "prompt_logprobs") return value == 0;
  return false;
}

// Fields that change the answer and that we do not have: refused unless they ask for nothing.
void RefuseUnsupported(JsonFields* fields, int n) {
  int best_of = n;
  if (fields->Read("best_of", 1, kMaxInt, &best_of) && best_of != n) {
    fields->Fail("best_of", "is not supported unless it equals n");
  }
  std::string suffix;
  if (fields->Read("suffix", &suffix) && !suffix.empty()) fields->Fail("suffix", "is not supported");
  const json* format = fields->Find("response_format");
  const bool is_text = format != nullptr && format->is_object() && format->value("type", json()) == "text";
  if (format != nullptr && !is_text && !AsksNothing(*format)) fields->Fail("response_format", "is not supported");
  for (const char* name : kUnsupported) {
    const json* field = fields->Find(name);
    const bool asks = field != nullptr && !AsksNothing(*field) && !IsNeutral(name, *field);
    if (asks) fields->Fail(name, "is not supported");
  }
  for (const auto& [name, choice_name] : {std::pair("tools", "tool_choice"), std::pair("functions", "function_call")}) {
    const json *tools = fields->Find(name), *choice = fields->Find(choice_name);
    const bool is_unused = choice != nullptr && *choice == "none";
    if (tools != nullptr && !AsksNothing(*tools) && !is_unused) fields->Fail(name, "are not supported");
  }
}

void ReadStreamOptions(JsonFields* fields, AnswerView* view) {
  fields->Read("stream", &view->stream);
  const json* options = fields->Find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) {
    fields->Fail("stream_options", "must be an object");
    return;
  }
  JsonFields stream_fields(*options, "stream_options.");
  stream_fields.Read("include_usage", &view->include_usage);
  stream_fields.Read("continuous_usage_stats", &view->continuous_usage);
  view->continuous_usage = view->continuous_usage && view->include_usage;
  fields->Take(stream_fields.status());
}

// What completions and chats have in common.
void ReadCommon(JsonFields* fields, CompletionRequest* request) {
  fields->Read("model", &request->model);
  ReadSampling(fields, &request->call.sampling);
  fields->ReadStrings("stop", &request->call.stop);
  fields->Read("include_stop_str_in_output", &request->call.include_stop);
  fields->Read("skip_special_tokens", &request->call.skip_special_tokens);
  fields->Read("n", 1, kMaxAnswers, &request->n);
  fields->Read("priority", std::numeric_limits<int32_t>::min(), kMaxInt, &request->call.priority);
  if (float seconds = 0; fields->Read("timeout", &seconds)) {
    if (!(seconds > 0)) fields->Fail("timeout", "must be more than 0 seconds");
    request->call.deadline = absl::Now() + absl::Seconds(seconds);
  }
  fields->Read("cache_salt", &request->call.cache_salt);
  fields->Read("return_token_ids", &request->view.token_ids);
  ReadStreamOptions(fields, &request->view);
  RefuseUnsupported(fields, request->n);
}

}  // namespace

absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body, const SamplingParams& defaults) {
  const absl::StatusOr<json> object = ParseJsonObject(body);
  if (!object.ok()) return object.status();
  JsonFields fields(*object);
  CompletionRequest request;
  request.call.sampling = defaults;
  ReadPrompts(&fields, &request);
  ReadCommon(&fields, &request);
  SamplingParams& sampling = request.call.sampling;
  fields.Read("max_tokens", 0, kMaxInt, &sampling.max_tokens);
  request.view.logprobs = fields.Read("logprobs", 0, 20, &sampling.logprobs);
  fields.Read("echo", &request.call.echo);
  fields.Read("add_special_tokens", &request.call.add_special_tokens);
  if (!fields.status().ok()) return fields.status();
  if (request.prompts.size() * request.n > kMaxChoices) {
    return FieldError("n", absl::StrCat("prompts times n may be at most ", kMaxChoices));
  }
  return request;
}

absl::StatusOr<CompletionRequest> ParseChatRequest(std::string_view body, const SamplingParams& defaults) {
  const absl::StatusOr<json> object = ParseJsonObject(body);
  if (!object.ok()) return object.status();
  JsonFields fields(*object);
  CompletionRequest request;
  request.call.sampling = defaults;
  request.view.kind = AnswerKind::kChat;
  ReadChatPrompt(&fields, &std::get<ChatPrompt>(request.prompts.emplace_back(ChatPrompt())));
  ReadCommon(&fields, &request);
  SamplingParams& sampling = request.call.sampling;
  const bool has_limit = fields.Read("max_tokens", 1, kMaxInt, &sampling.max_tokens);
  request.call.fill_context = !fields.Read("max_completion_tokens", 1, kMaxInt, &sampling.max_tokens) && !has_limit;
  fields.Read("logprobs", &request.view.logprobs);
  if (request.view.logprobs) sampling.logprobs = 0;
  if (fields.Read("top_logprobs", 0, 20, &sampling.logprobs) && !request.view.logprobs) {
    if (sampling.logprobs > 0) fields.Fail("top_logprobs", "needs logprobs to be true");
    sampling.logprobs = -1;
  }
  if (!fields.status().ok()) return fields.status();
  return request;
}

absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body) {
  const absl::StatusOr<json> object = ParseJsonObject(body);
  if (!object.ok()) return object.status();
  JsonFields fields(*object);
  TokenizeRequest request;
  fields.Read("model", &request.model);
  if (fields.Find("messages") != nullptr) {
    ReadChatPrompt(&fields, &request.prompt.emplace<ChatPrompt>());
  } else if (!fields.Read("prompt", &request.prompt.emplace<std::string>())) {
    fields.Fail("prompt", "is missing");
  }
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
