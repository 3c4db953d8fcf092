// The methods: a request is parsed and checked, then answered at once or by a reactor.
#include "server/grpc/cachalot_service.h"

#include <chrono>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/grpc/answer_reactors.h"
#include "server/grpc/grpc_messages.h"
#include "server/grpc/proto_calls.h"
#include "server/request_error.h"

namespace cachalot {
namespace {

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const std::chrono::system_clock::time_point deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture() : absl::FromChrono(deadline);
}

}  // namespace

template <typename Request>
absl::Status CachalotService::Parse(const Bytes& bytes, Request* request) const {
  if (absl::Status status = ParseMessage(bytes, request); !status.ok()) return status;
  return CheckModelName(request->model(), model_name_);
}

// --- Methods that generate ---

template <typename Request, typename Reactor>
Reactor* CachalotService::Run(Reactor* reactor, Context* context, const Bytes& bytes) const {
  const auto prepare = [&](int* n) -> absl::StatusOr<std::shared_ptr<const GeneratePlan>> {
    Request request;
    if (absl::Status status = Parse(bytes, &request); !status.ok()) return status;
    const absl::StatusOr<int> num_answers = NumAnswers(request);
    if (!num_answers.ok()) return num_answers.status();
    *n = *num_answers;
    absl::StatusOr<GenerateCall> call = ToCall(request);
    if (!call.ok()) return call.status();
    call->deadline = DeadlineOf(*context);
    call->client = context->peer();
    return generator_->Prepare(*std::move(call));
  };
  int n = 0;
  const absl::StatusOr<std::shared_ptr<const GeneratePlan>> plan = prepare(&n);
  if (plan.ok()) {
    reactor->Start(generator_, *plan, n);
  } else {
    reactor->Fail(plan.status());
  }
  return reactor;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* CachalotService::Complete(Context* context, const Bytes* request) {
  return Run<v1::CompleteRequest>(new StreamReactor<v1::CompleteResponse>(context), context, *request);
}

grpc::ServerUnaryReactor* CachalotService::CompleteUnary(Context* context, const Bytes* request, Bytes* response) {
  return Run<v1::CompleteRequest>(new UnaryReactor<v1::CompleteUnaryResponse>(context, response), context, *request);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* CachalotService::Chat(Context* context, const Bytes* request) {
  return Run<v1::ChatRequest>(new StreamReactor<v1::ChatResponse>(context), context, *request);
}

grpc::ServerUnaryReactor* CachalotService::ChatUnary(Context* context, const Bytes* request, Bytes* response) {
  return Run<v1::ChatRequest>(new UnaryReactor<v1::ChatUnaryResponse>(context, response), context, *request);
}

// --- Methods that are answered at once ---

template <typename Request, typename Response>
grpc::ServerUnaryReactor* CachalotService::Reply(Context* context, const Bytes& bytes, Bytes* buffer) const {
  Request request;
  Response response;
  absl::Status status = Parse(bytes, &request);
  if (status.ok()) status = Answer(request, &response);
  if (status.ok()) *buffer = SerializeMessage(response);
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status, context));
  return reactor;
}

grpc::ServerUnaryReactor* CachalotService::Tokenize(Context* context, const Bytes* request, Bytes* response) {
  return Reply<v1::TokenizeRequest, v1::TokenizeResponse>(context, *request, response);
}

grpc::ServerUnaryReactor* CachalotService::Detokenize(Context* context, const Bytes* request, Bytes* response) {
  return Reply<v1::DetokenizeRequest, v1::DetokenizeResponse>(context, *request, response);
}

grpc::ServerUnaryReactor* CachalotService::ModelInfo(Context* context, const Bytes* request, Bytes* response) {
  return Reply<v1::ModelInfoRequest, v1::ModelInfoResponse>(context, *request, response);
}

absl::Status CachalotService::Answer(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const {
  absl::StatusOr<std::vector<int32_t>> ids = FieldError("prompt", "the request has no prompt: set text or chat");
  if (request.has_text()) {
    ids = generator_->Tokenize(request.text(), !request.has_add_special_tokens() || request.add_special_tokens());
  } else if (request.has_chat()) {
    const absl::StatusOr<ChatPrompt> chat = ToChatPrompt(request.chat());
    if (!chat.ok()) return chat.status();
    ids = generator_->Tokenize(*chat);
  }
  if (!ids.ok()) return ids.status();
  response->mutable_token_ids()->Add(ids->begin(), ids->end());
  response->set_max_model_len(generator_->model().max_model_len);
  return absl::OkStatus();
}

absl::Status CachalotService::Answer(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) const {
  const Tokenizer* const tokenizer = generator_->tokenizer();
  if (tokenizer == nullptr) return FieldError("token_ids", "this model is served without a tokenizer");
  const int vocab_size = generator_->model().vocab_size;
  for (const int32_t token : request.token_ids()) {
    if (token >= 0 && token < vocab_size) continue;
    return FieldError("token_ids", absl::StrCat("token_ids holds ", token, "; token ids are 0 to ", vocab_size - 1));
  }
  const std::vector<int32_t> ids(request.token_ids().begin(), request.token_ids().end());
  response->set_text(tokenizer->Decode(ids, /*skip_special=*/false));
  return absl::OkStatus();
}

absl::Status CachalotService::Answer(const v1::ModelInfoRequest&, v1::ModelInfoResponse* response) const {
  const cachalot::ModelInfo& model = generator_->model();
  response->set_model(model_name_);
  response->set_model_type(model.model_type);
  response->set_backend(model.backend);
  response->set_max_model_len(model.max_model_len);
  response->set_vocab_size(model.vocab_size);
  if (const auto& chat_template = generator_->options().chat_template; chat_template.has_value()) {
    response->set_chat_template(std::string(chat_template->Name()));
  }
  response->set_has_tokenizer(generator_->tokenizer() != nullptr);
  return absl::OkStatus();
}

}  // namespace cachalot
