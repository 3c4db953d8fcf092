// Events of several generations, from the engine's output thread, become one response.
#include "server/http/completion_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http/openai_error.h"
#include "server/request_error.h"

namespace cachalot {
namespace {

std::string NewId(AnswerKind kind) {
  return absl::StrCat(kind == AnswerKind::kChat ? "chatcmpl-" : "cmpl-", absl::Hex(RandomSeed(), absl::kZeroPad16));
}

AnswerView ViewOf(const Generator& generator, const CompletionRequest& request) {
  AnswerView view = request.view;
  view.token_ids = view.token_ids || generator.tokenizer() == nullptr;
  return view;
}

absl::Status TooManyScores() {
  return FieldError("logprobs", absl::StrCat("the answer has more than ", kMaxHeldScores,
                                             " log-probabilities: stream it, or ask for less at once"));
}

size_t NumScores(const GenerateEvent& event) {
  size_t count = 0;
  for (const TokenScore& score : event.scores) count += 1 + score.top.size();
  return count;
}

}  // namespace

void CompletionCall::Run(Generator* generator, const std::string& model_name, CompletionRequest request,
                         std::shared_ptr<HttpResponder> responder) {
  std::shared_ptr<CompletionCall> call(new CompletionCall(generator, model_name, request, std::move(responder)));
  if (absl::Status status = call->Prepare(std::move(request)); !status.ok()) {
    return call->responder_->Respond(ErrorResponse(status));
  }
  call->responder_->OnDisconnect([call] {
    call->CancelAll();
    call->responder_->Close();
  });
  call->Start();
}

CompletionCall::CompletionCall(Generator* generator, const std::string& model_name, const CompletionRequest& request,
                               std::shared_ptr<HttpResponder> responder)
    : generator_(generator),
      responder_(std::move(responder)),
      view_(ViewOf(*generator, request)),
      num_answers_(request.n),
      writer_(view_, NewId(view_.kind), absl::ToUnixSeconds(absl::Now()), model_name) {}

// All prompts are checked before the first is started.
absl::Status CompletionCall::Prepare(CompletionRequest request) {
  MutexLock lock(&mutex_);  // of a call that nobody else knows yet
  for (auto& prompt : request.prompts) {
    GenerateCall call = request.call;
    call.prompt = std::move(prompt);
    auto plan = generator_->Prepare(std::move(call));
    if (!plan.ok()) return plan.status();
    usage_.prompt_tokens += static_cast<int64_t>((*plan)->prompt.size());
    plans_.push_back(std::move(*plan));
  }
  const int max_requests = generator_->model().max_waiting;
  num_running_ = static_cast<int>(plans_.size()) * num_answers_;
  if (num_running_ > max_requests) {
    return FieldError("n", absl::StrCat("prompts times n may be at most ", max_requests, ", the length of the queue"));
  }
  // NOTE: what a stream may hold depends on its client; what a whole answer will at least, is known.
  if (const int top = request.call.sampling.logprobs; request.call.echo && top >= 0 && !view_.stream) {
    const int64_t num_prompts = static_cast<int64_t>(plans_.size());  // whose first tokens have no log-probability
    const int64_t num_scores = num_prompts + (usage_.prompt_tokens - num_prompts) * (1 + top);
    if (num_scores * num_answers_ > static_cast<int64_t>(kMaxHeldScores)) return TooManyScores();
  }
  choices_.resize(num_running_);
  choice_usages_.resize(num_running_);
  for (int i = 0; i < num_running_; ++i) {
    choices_[i].prompt = &plans_[i / num_answers_]->prompt;
    choice_usages_[i].prompt_tokens = static_cast<int64_t>(choices_[i].prompt->size());
  }
  return absl::OkStatus();
}

void CompletionCall::Start() {
  const int num_choices = static_cast<int>(plans_.size()) * num_answers_;
  for (int i = 0; i < num_choices; ++i) {
    {
      MutexLock lock(&mutex_);
      if (is_over_ || is_cancelled_) return;
    }
    auto generation =
        generator_->Start(plans_[i / num_answers_], static_cast<uint32_t>(i % num_answers_),
                          [call = shared_from_this(), i](GenerateEvent event) { call->OnEvent(i, std::move(event)); });
    if (!generation.ok()) {
      {
        MutexLock lock(&mutex_);
        FailAnswer(generation.status());
      }
      return CancelAll();
    }
    bool is_unwanted;
    {
      MutexLock lock(&mutex_);
      generations_.push_back(*generation);
      is_unwanted = is_over_ || is_cancelled_;
    }
    if (is_unwanted) (*generation)->Cancel();
  }
  MutexLock lock(&mutex_);
  if (view_.stream && !is_over_) BeginStream();
}

// NOTE: generations are cancelled outside the lock, which their sinks take.
void CompletionCall::CancelAll() {
  std::vector<std::shared_ptr<Generation>> generations;
  {
    MutexLock lock(&mutex_);
    is_cancelled_ = true;
    generations.swap(generations_);
  }
  for (const auto& generation : generations) generation->Cancel();
}

void CompletionCall::OnEvent(int choice_idx, GenerateEvent event) {
  bool has_failed = false;
  {
    MutexLock lock(&mutex_);
    if (is_over_) return;
    const FinishReason reason = event.finish_reason;
    usage_.completion_tokens += static_cast<int64_t>(event.tokens.size());
    choice_usages_[choice_idx].completion_tokens += static_cast<int64_t>(event.tokens.size());
    choice_usages_[choice_idx].cached_tokens = event.usage.cached_tokens;
    if (reason == FinishReason::kError) {
      FailAnswer(event.error);
    } else {
      view_.stream ? StreamEvent(choice_idx, std::move(event)) : GatherEvent(choice_idx, std::move(event));
      if (!is_over_ && reason != FinishReason::kNone && --num_running_ == 0) FinishAnswer();
    }
    has_failed = is_over_ && num_running_ > 0;
  }
  if (has_failed) CancelAll();
}

void CompletionCall::GatherEvent(int choice_idx, GenerateEvent event) {
  num_held_scores_ += NumScores(event);
  AppendEvent(std::move(event), &choices_[choice_idx].answer);
  if (num_held_scores_ <= kMaxHeldScores) return;
  FailAnswer(TooManyScores());
}

void CompletionCall::StreamEvent(int choice_idx, GenerateEvent event) {
  AnswerChoice& choice = choices_[choice_idx];
  const bool is_last = event.finish_reason != FinishReason::kNone;
  if (!is_last && responder_->Backlog() > kMaxBacklogBytes) {
    num_held_scores_ += NumScores(event);
    AppendEvent(std::move(event), &choice.answer);
    if (num_held_scores_ <= kMaxHeldScores) return;
    return FailAnswer(absl::ResourceExhaustedError("the client took its answer too slowly"));
  }
  num_held_scores_ -= NumScores(choice.answer);
  AppendEvent(std::move(event), &choice.answer);
  event = std::exchange(choice.answer, {});
  if (!writer_.IsVisible(event)) return;
  BeginStream();
  bytes_.clear();
  writer_.AppendEvents(choice_idx, event, std::exchange(choice.prompt, nullptr), choice_usages_[choice_idx], &bytes_);
  responder_->Write(bytes_);
}

void CompletionCall::BeginStream() {
  if (std::exchange(has_begun_, true)) return;
  responder_->Begin(
      {.content_type = "text/event-stream; charset=utf-8", .body = "", .headers = {{"Cache-Control", "no-cache"}}});
}

// A prompt counts once, and so does what of it was not cached: for the answer that computed most of it.
void CompletionCall::CountCached() {
  for (auto first = choice_usages_.begin(); first != choice_usages_.end(); first += num_answers_) {
    usage_.cached_tokens += std::min_element(first, first + num_answers_, [](const Usage& a, const Usage& b) {
                              return a.cached_tokens < b.cached_tokens;
                            })->cached_tokens;
  }
}

void CompletionCall::FinishAnswer() {
  is_over_ = true;
  CountCached();
  generations_.clear();
  if (!view_.stream) {
    // NOTE: of log-probabilities there may be megabytes, and this is the engine's output thread.
    return responder_->RespondWith([self = shared_from_this(), choices = std::move(choices_), usage = usage_] {
      return HttpResponse{.body = self->writer_.Whole(choices, usage), .headers = {}};
    });
  }
  bytes_.clear();
  writer_.AppendDone(usage_, &bytes_);
  responder_->Write(bytes_);
  responder_->End();
}

void CompletionCall::FailAnswer(const absl::Status& status) {
  if (std::exchange(is_over_, true)) return;
  if (!has_begun_) return responder_->Respond(ErrorResponse(status));
  responder_->Write(SseEvent(Dump(ErrorJson(status))));
  responder_->End();
}

}  // namespace cachalot
