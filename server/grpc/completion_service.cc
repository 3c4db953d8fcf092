// One reactor a call: events from the engine's output thread wait in a queue while gRPC writes.
#include "server/grpc/completion_service.h"

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

GenerateCall ToCall(const v1::CompleteRequest& request) {
  GenerateCall call;
  if (request.has_text()) {
    call.prompt = request.text();
  } else {
    call.prompt = std::vector<int32_t>(request.token_ids().ids().begin(), request.token_ids().ids().end());
  }
  const v1::SamplingParams& from = request.sampling();
  SamplingParams& to = call.sampling;
  if (from.has_temperature()) to.temperature = from.temperature();
  if (from.has_top_p()) to.top_p = from.top_p();
  if (from.has_top_k()) to.top_k = from.top_k();
  if (from.has_min_p()) to.min_p = from.min_p();
  if (from.has_presence_penalty()) to.presence_penalty = from.presence_penalty();
  if (from.has_frequency_penalty()) to.frequency_penalty = from.frequency_penalty();
  if (from.has_repetition_penalty()) to.repetition_penalty = from.repetition_penalty();
  if (from.has_max_tokens()) to.max_tokens = from.max_tokens();
  to.seed = from.has_seed() ? from.seed() : RandomSeed();
  to.ignore_eos = from.ignore_eos();
  to.stop_token_ids.assign(from.stop_token_ids().begin(), from.stop_token_ids().end());
  if (request.has_logprobs()) to.logprobs = request.logprobs();
  call.stop.assign(request.stop().begin(), request.stop().end());
  call.echo = request.echo();
  if (request.has_add_special_tokens()) call.add_special_tokens = request.add_special_tokens();
  return call;
}

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return v1::FINISH_REASON_STOP;
    case FinishReason::kLength: return v1::FINISH_REASON_LENGTH;
    default: return v1::FINISH_REASON_UNSPECIFIED;
  }
}

v1::CompleteResponse ToProto(const GenerateEvent& event) {
  v1::CompleteResponse response;
  response.set_text(event.text);
  response.mutable_token_ids()->Add(event.tokens.begin(), event.tokens.end());
  for (const TokenScore& score : event.scores) {
    v1::TokenLogprob* logprob = response.add_logprobs();
    logprob->set_token_id(score.token);
    logprob->set_token(score.bytes);
    if (score.logprob.has_value()) logprob->set_logprob(*score.logprob);
    for (const auto& [bytes, value] : score.top) {
      v1::TokenLogprob::Alternative* alternative = logprob->add_top();
      alternative->set_token(bytes);
      alternative->set_logprob(value);
    }
  }
  response.set_finish_reason(ToProto(event.finish_reason));
  if (event.finish_reason != FinishReason::kNone) {
    response.mutable_usage()->set_prompt_tokens(event.usage.prompt_tokens);
    response.mutable_usage()->set_completion_tokens(event.usage.completion_tokens);
  }
  return response;
}

// Deletes itself when gRPC is done with it and the generation has ended: both call it.
class CompleteReactor final : public grpc::ServerWriteReactor<v1::CompleteResponse> {
 public:
  // Starts the generation; fails the call if that fails.
  static CompleteReactor* Run(Generator* generator, GenerateCall call) {
    auto* reactor = new CompleteReactor;
    reactor->self_.reset(reactor);
    absl::StatusOr<std::shared_ptr<const GeneratePlan>> plan = generator->Prepare(std::move(call));
    if (!plan.ok()) {
      reactor->Finish(ToGrpcStatus(plan.status()));
      return reactor;
    }
    auto generation = generator->Start(std::move(*plan), /*choice=*/0, [self = reactor->self_](GenerateEvent event) {
      self->OnEvent(std::move(event));
    });
    if (!generation.ok()) {
      reactor->Finish(ToGrpcStatus(generation.status()));
      return reactor;
    }
    reactor->SetGeneration(std::move(*generation));
    return reactor;
  }

  static CompleteReactor* Fail(const absl::Status& status) {
    auto* reactor = new CompleteReactor;
    reactor->self_.reset(reactor);
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }

  void OnWriteDone(bool ok) override {
    {
      std::lock_guard lock(mutex_);
      is_writing_ = false;
      if (!responses_.empty()) responses_.pop_front();
      if (!ok) is_cancelled_ = true;
    }
    Advance();
  }

  // The client has gone, its deadline has passed or the server stops.
  void OnCancel() override {
    std::shared_ptr<Generation> generation;
    {
      std::lock_guard lock(mutex_);
      is_cancelled_ = true;
      generation = generation_;
    }
    if (generation != nullptr) generation->Cancel();
    Advance();
  }

  void OnDone() override {
    {
      std::lock_guard lock(mutex_);
      generation_ = nullptr;
    }
    self_.reset();
  }

 private:
  // On the engine's output thread.
  void OnEvent(GenerateEvent event) {
    {
      std::lock_guard lock(mutex_);
      if (event.finish_reason == FinishReason::kError) {
        status_ = ToGrpcStatus(event.error);
      } else if (event.finish_reason == FinishReason::kCancelled) {
        status_ = grpc::Status::CANCELLED;
      } else {
        responses_.push_back(ToProto(event));
        if (event.finish_reason != FinishReason::kNone) status_ = grpc::Status::OK;
      }
    }
    Advance();
  }

  void SetGeneration(std::shared_ptr<Generation> generation) {
    bool is_cancelled;
    {
      std::lock_guard lock(mutex_);
      generation_ = generation;
      is_cancelled = is_cancelled_;
    }
    if (is_cancelled) generation->Cancel();
  }

  // Writes the next response, or finishes when there will be none. NOTE: gRPC is called outside the lock: it may call
  // back at once.
  void Advance() {
    const v1::CompleteResponse* next = nullptr;
    std::optional<grpc::Status> final_status;
    {
      std::lock_guard lock(mutex_);
      if (is_writing_ || has_finished_) return;
      if (is_cancelled_) {
        final_status = grpc::Status::CANCELLED;
      } else if (!responses_.empty()) {
        next = &responses_.front();
        is_writing_ = true;
      } else {
        final_status = status_;
      }
      has_finished_ = final_status.has_value();
    }
    if (next != nullptr) StartWrite(next);
    if (final_status.has_value()) Finish(*final_status);
  }

  std::shared_ptr<CompleteReactor> self_;  // gRPC's share, until OnDone
  std::mutex mutex_;                       // guards all below
  std::shared_ptr<Generation> generation_;
  std::deque<v1::CompleteResponse> responses_;  // the first is being written while is_writing_
  std::optional<grpc::Status> status_;          // set when no response will follow
  bool is_writing_ = false, is_cancelled_ = false, has_finished_ = false;
};

}  // namespace

grpc::ServerWriteReactor<v1::CompleteResponse>* CompletionService::Complete(grpc::CallbackServerContext*,
                                                                            const v1::CompleteRequest* request) {
  if (!request->model().empty() && request->model() != model_name_) {
    return CompleteReactor::Fail(absl::NotFoundError(
        absl::StrCat("The model '", request->model(), "' does not exist; this server has '", model_name_, "'")));
  }
  if (request->prompt_case() == v1::CompleteRequest::PROMPT_NOT_SET) {
    return CompleteReactor::Fail(absl::InvalidArgumentError("the request has no prompt: set text or token_ids"));
  }
  return CompleteReactor::Run(generator_, ToCall(*request));
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

}  // namespace cachalot
