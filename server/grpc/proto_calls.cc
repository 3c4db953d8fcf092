// Field by field; CompleteRequest and ChatRequest share what they share.
#include "server/grpc/proto_calls.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/request_error.h"
#include "server/text/generator.h"

namespace cachalot {
namespace {

constexpr int kMaxAnswers = 128;

SamplingParams ToSampling(const v1::SamplingParams& from, const SamplingParams& defaults) {
  SamplingParams to = defaults;
  if (from.has_temperature()) to.temperature = from.temperature();
  if (from.has_top_p()) to.top_p = from.top_p();
  if (from.has_top_k()) to.top_k = from.top_k();
  if (from.has_min_p()) to.min_p = from.min_p();
  if (from.has_presence_penalty()) to.presence_penalty = from.presence_penalty();
  if (from.has_frequency_penalty()) to.frequency_penalty = from.frequency_penalty();
  if (from.has_repetition_penalty()) to.repetition_penalty = from.repetition_penalty();
  if (from.has_max_tokens()) to.max_tokens = from.max_tokens();
  to.min_tokens = from.min_tokens();
  to.seed = from.has_seed() ? from.seed() : RandomSeed();
  to.ignore_eos = from.ignore_eos();
  to.stop_token_ids.assign(from.stop_token_ids().begin(), from.stop_token_ids().end());
  to.logit_bias.assign(from.logit_bias().begin(), from.logit_bias().end());
  return to;
}

// What both kinds of requests have.
template <typename Request>
absl::Status ReadCommon(const Request& request, const SamplingParams& defaults, GenerateCall* call) {
  call->sampling = ToSampling(request.sampling(), defaults);
  if (request.has_logprobs()) {
    // NOTE: to the engine -1 is none, for a client it is a mistake.
    if (request.logprobs() < 0) return FieldError("logprobs", "logprobs must not be negative");
    call->sampling.logprobs = request.logprobs();
  }
  call->stop.assign(request.stop().begin(), request.stop().end());
  call->priority = request.priority();
  call->cache_salt = request.cache_salt();
  return absl::OkStatus();
}

std::optional<ChatMessage::Role> ToRole(const std::string& role) {
  using Role = ChatMessage::Role;
  if (role == "system" || role == "developer") return Role::kSystem;
  if (role == "user") return Role::kUser;
  if (role == "assistant") return Role::kAssistant;
  if (role == "tool") return Role::kTool;
  return std::nullopt;
}

template <typename Request>
absl::StatusOr<int> ReadNumAnswers(const Request& request) {
  const int n = request.has_n() ? request.n() : 1;
  if (n < 1 || n > kMaxAnswers) return FieldError("n", absl::StrCat("n must be between 1 and ", kMaxAnswers));
  return n;
}

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return v1::FINISH_REASON_STOP;
    case FinishReason::kLength: return v1::FINISH_REASON_LENGTH;
    default: return v1::FINISH_REASON_UNSPECIFIED;
  }
}

// Most responses get one event: its text is moved.
void AppendText(std::string from, std::string* to) {
  if (to->empty()) {
    *to = std::move(from);
  } else {
    to->append(from);
  }
}

template <typename Response>
void AppendCommon(GenerateEvent event, Response* response) {
  if (!event.text.empty()) AppendText(std::move(event.text), response->mutable_text());
  response->mutable_token_ids()->Add(event.tokens.begin(), event.tokens.end());
  for (TokenScore& score : event.scores) {
    v1::TokenLogprob* logprob = response->add_logprobs();
    logprob->set_token_id(score.token);
    logprob->set_token(std::move(score.bytes));
    if (score.logprob.has_value()) logprob->set_logprob(*score.logprob);
    for (auto& [bytes, value] : score.top) {
      v1::TokenLogprob::Alternative* alternative = logprob->add_top();
      alternative->set_token(std::move(bytes));
      alternative->set_logprob(value);
    }
  }
  if (event.finish_reason == FinishReason::kNone) return;
  response->set_finish_reason(ToProto(event.finish_reason));
  response->set_stop_string(std::move(event.stop_string));
  response->mutable_usage()->set_prompt_tokens(event.usage.prompt_tokens);
  response->mutable_usage()->set_completion_tokens(event.usage.completion_tokens);
  response->mutable_usage()->set_cached_tokens(event.usage.cached_tokens);
}

}  // namespace

absl::StatusOr<GenerateCall> ToCall(const v1::CompleteRequest& request, const SamplingParams& defaults) {
  GenerateCall call;
  if (absl::Status status = ReadCommon(request, defaults, &call); !status.ok()) return status;
  switch (request.prompt_case()) {
    case v1::CompleteRequest::kText: call.prompt = request.text(); break;
    case v1::CompleteRequest::kTokenIds:
      call.prompt = std::vector<int32_t>(request.token_ids().ids().begin(), request.token_ids().ids().end());
      break;
    default: return FieldError("prompt", "the request has no prompt: set text or token_ids");
  }
  call.echo = request.echo();
  if (request.has_add_special_tokens()) call.add_special_tokens = request.add_special_tokens();
  return call;
}

absl::StatusOr<GenerateCall> ToCall(const v1::ChatRequest& request, const SamplingParams& defaults) {
  GenerateCall call;
  if (absl::Status status = ReadCommon(request, defaults, &call); !status.ok()) return status;
  absl::StatusOr<ChatPrompt> prompt = ToChatPrompt(request.prompt());
  if (!prompt.ok()) return prompt.status();
  call.prompt = *std::move(prompt);
  call.fill_context = !request.sampling().has_max_tokens();
  return call;
}

absl::StatusOr<ChatPrompt> ToChatPrompt(const v1::ChatPrompt& prompt) {
  ChatPrompt chat;
  chat.thinking = prompt.thinking();
  chat.continue_final_message = prompt.continue_final_message();
  chat.add_generation_prompt =
      prompt.has_add_generation_prompt() ? prompt.add_generation_prompt() : !prompt.continue_final_message();
  chat.messages.reserve(prompt.messages_size());
  for (const v1::ChatMessage& from : prompt.messages()) {
    const auto wrong = [&](const char* what) {
      return FieldError("messages", absl::StrCat("messages[", chat.messages.size(), "]", what));
    };
    const std::optional<ChatMessage::Role> role = ToRole(from.role());
    if (!role.has_value()) return wrong(".role must be system, developer, user, assistant or tool");
    if (*role != ChatMessage::Role::kAssistant && from.tool_calls_size() > 0) {
      return wrong(" has tool_calls, but only an assistant's message may");
    }
    ChatMessage to{.role = *role, .content = std::nullopt, .prefix = from.prefix()};
    if (from.has_content()) to.content = from.content();
    const bool is_empty_answer = *role == ChatMessage::Role::kAssistant && from.tool_calls_size() == 0;
    if (!from.has_content() && is_empty_answer) to.content = "";
    for (const v1::ToolCall& call : from.tool_calls()) {
      to.tool_calls.push_back(
          {.type = call.type().empty() ? "function" : call.type(), .name = call.name(), .arguments = call.arguments()});
    }
    chat.messages.push_back(std::move(to));
  }
  return chat;
}

absl::StatusOr<int> NumAnswers(const v1::CompleteRequest& request) { return ReadNumAnswers(request); }
absl::StatusOr<int> NumAnswers(const v1::ChatRequest& request) { return ReadNumAnswers(request); }

void Append(GenerateEvent event, v1::CompleteResponse* response) { AppendCommon(std::move(event), response); }

void Append(GenerateEvent event, v1::ChatResponse* response) {
  if (event.takes_back_reasoning) response->clear_reasoning();
  if (!event.reasoning.empty()) AppendText(std::move(event.reasoning), response->mutable_reasoning());
  AppendCommon(std::move(event), response);
}

}  // namespace cachalot
