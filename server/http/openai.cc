// Handlers: each parses, asks the generator, and answers.
#include "server/http/openai.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "server/http/completion_call.h"
#include "server/http/openai_error.h"
#include "server/http/openai_request.h"
#include "server/logging.h"
#include "server/request_error.h"

namespace cachalot {
namespace {

using nlohmann::ordered_json;

constexpr char kModelsPath[] = "/v1/models/";
constexpr size_t kMaxTextBytes = 16 << 20;  // of /detokenize, as much as a body may have

void RespondJson(const std::shared_ptr<HttpResponder>& responder, const ordered_json& json) {
  responder->Respond({.body = Dump(json), .headers = {}});
}

}  // namespace

OpenAiApi::OpenAiApi(Generator* generator, const Metrics* metrics, std::string model_name, std::string model_root,
                     std::string version)
    : generator_(generator),
      metrics_(metrics),
      model_name_(std::move(model_name)),
      model_root_(std::move(model_root)),
      version_(std::move(version)),
      created_(absl::ToUnixSeconds(absl::Now())) {}

void OpenAiApi::Register(HttpServer* server) {
  const auto handle = [this, server](const char* method, const char* path,
                                     void (OpenAiApi::*handler)(HttpRequest, Responder) const) {
    server->Handle(method, path, [this, handler](HttpRequest request, Responder responder) {
      (this->*handler)(std::move(request), std::move(responder));
    });
  };
  handle("POST", "/v1/completions", &OpenAiApi::Completions);
  handle("POST", "/v1/chat/completions", &OpenAiApi::ChatCompletions);
  handle("POST", "/tokenize", &OpenAiApi::Tokenize);
  handle("POST", "/detokenize", &OpenAiApi::Detokenize);
  handle("POST", "/reset_prefix_cache", &OpenAiApi::ResetPrefixCache);
  handle("GET", "/v1/models", &OpenAiApi::Models);
  handle("GET", absl::StrCat(kModelsPath, "*").c_str(), &OpenAiApi::Model);
  handle("GET", "/readyz", &OpenAiApi::Ready);
  handle("GET", "/health", &OpenAiApi::Health);
  handle("GET", "/metrics", &OpenAiApi::MetricsPage);
  server->Handle("GET", "/livez", [](HttpRequest, Responder responder) {
    RespondJson(responder, {{"status", "alive"}});
  });
  server->Handle("GET", "/version", [this](HttpRequest, Responder responder) {
    RespondJson(responder, {{"version", version_}});
  });
}

void OpenAiApi::Completions(HttpRequest request, Responder responder) const {
  Answer(request, ParseCompletionRequest(request.body, generator_->options().sampling), std::move(responder));
}

void OpenAiApi::ChatCompletions(HttpRequest request, Responder responder) const {
  Answer(request, ParseChatRequest(request.body, generator_->options().sampling), std::move(responder));
}

void OpenAiApi::Answer(const HttpRequest& request, absl::StatusOr<CompletionRequest> completion,
                       Responder responder) const {
  if (!completion.ok()) return responder->Respond(ErrorResponse(completion.status()));
  if (absl::Status status = CheckModelName(completion->model, model_name_); !status.ok()) {
    return responder->Respond(ErrorResponse(status));
  }
  completion->call.client = request.client;
  CompletionCall::Run(generator_, model_name_, std::move(*completion), std::move(responder));
}

void OpenAiApi::Tokenize(HttpRequest request, Responder responder) const {
  const absl::StatusOr<TokenizeRequest> call = ParseTokenizeRequest(request.body);
  if (!call.ok()) return responder->Respond(ErrorResponse(call.status()));
  if (absl::Status status = CheckModelName(call->model, model_name_); !status.ok())
    return responder->Respond(ErrorResponse(status));
  const auto* chat = std::get_if<ChatPrompt>(&call->prompt);
  const absl::StatusOr<std::vector<int32_t>> tokens =
      chat != nullptr ? generator_->Tokenize(*chat)
                      : generator_->Tokenize(std::get<std::string>(call->prompt), call->add_special_tokens);
  if (!tokens.ok()) return responder->Respond(ErrorResponse(tokens.status()));
  // NOTE: of millions of tokens a JSON document would take a hundred megabytes.
  responder->Respond(
      {.body = absl::StrCat("{\"count\":", tokens->size(), ",\"max_model_len\":", generator_->model().max_model_len,
                            ",\"tokens\":[", absl::StrJoin(*tokens, ","), "]}"),
       .headers = {}});
}

void OpenAiApi::Detokenize(HttpRequest request, Responder responder) const {
  const absl::StatusOr<DetokenizeRequest> call = ParseDetokenizeRequest(request.body);
  if (!call.ok()) return responder->Respond(ErrorResponse(call.status()));
  if (absl::Status status = CheckModelName(call->model, model_name_); !status.ok())
    return responder->Respond(ErrorResponse(status));
  absl::StatusOr<std::string> text = generator_->Detokenize(call->tokens, "tokens", kMaxTextBytes);
  if (!text.ok()) return responder->Respond(ErrorResponse(text.status()));
  RespondJson(responder, {{"prompt", *std::move(text)}});
}

void OpenAiApi::ResetPrefixCache(HttpRequest, Responder responder) const {
  if (absl::Status status = generator_->ResetPrefixCache(); !status.ok()) {
    return responder->Respond(ErrorResponse(status));
  }
  RespondJson(responder, {{"status", "reset"}});
}

void OpenAiApi::Models(HttpRequest, Responder responder) const {
  responder->Respond({.body = absl::StrCat("{\"object\":\"list\",\"data\":[", ModelJson(), "]}"), .headers = {}});
}

void OpenAiApi::Model(HttpRequest request, Responder responder) const {
  const std::string name = request.path.substr(sizeof(kModelsPath) - 1);
  if (absl::Status status = CheckModelName(name, model_name_); !status.ok())
    return responder->Respond(ErrorResponse(status));
  responder->Respond({.body = ModelJson(), .headers = {}});
}

std::string OpenAiApi::ModelJson() const {
  ordered_json json;
  json["id"] = model_name_;
  json["object"] = "model";
  json["created"] = created_;
  json["owned_by"] = "cachalot";
  json["root"] = model_root_;
  json["max_model_len"] = generator_->model().max_model_len;
  return Dump(json);
}

void OpenAiApi::Ready(HttpRequest, Responder responder) const {
  const absl::Status health = generator_->health();
  if (health.ok()) return RespondJson(responder, {{"status", "ready"}});
  responder->Respond(HttpErrorResponse(503, std::string(health.message())));
}

void OpenAiApi::Health(HttpRequest, Responder responder) const {
  const absl::Status health = generator_->engine_health();
  if (health.ok()) return RespondJson(responder, {{"status", "healthy"}});
  responder->Respond(HttpErrorResponse(503, std::string(health.message())));
}

void OpenAiApi::MetricsPage(HttpRequest, Responder responder) const {
  responder->Respond(
      {.content_type = "text/plain; version=0.0.4; charset=utf-8",
       .body = metrics_->Render(model_name_, generator_->rank_stats(), generator_->model(), NumDroppedLogMessages()),
       .headers = {}});
}

}  // namespace cachalot
