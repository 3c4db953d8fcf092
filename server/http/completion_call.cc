// Events of several generations, from the engine's output thread, become one response.
#include "server/http/completion_call.h"

#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http/openai_error.h"

namespace cachalot {
namespace {

using nlohmann::ordered_json;

std::string NewId() { return absl::StrCat("cmpl-", absl::Hex(RandomSeed(), absl::kZeroPad16)); }

bool IsWorthAChunk(const GenerateEvent& event, CompletionView view) {
  return !event.text.empty() || (view.logprobs && !event.scores.empty()) || (view.token_ids && !event.tokens.empty()) ||
         event.finish_reason != FinishReason::kNone;
}

}  // namespace

void CompletionCall::Run(Generator* generator, std::string model_name, CompletionRequest request,
                         std::shared_ptr<HttpResponder> responder) {
  std::shared_ptr<CompletionCall> call(
      new CompletionCall(generator, std::move(model_name), request, std::move(responder)));
  if (absl::Status status = call->Prepare(std::move(request)); !status.ok()) {
    return call->responder_->Respond(ErrorResponse(status));
  }
  call->responder_->OnDisconnect([call] { call->CancelAll(); });
  call->Start();
}

CompletionCall::CompletionCall(Generator* generator, std::string model_name, const CompletionRequest& request,
                               std::shared_ptr<HttpResponder> responder)
    : generator_(generator),
      responder_(std::move(responder)),
      is_stream_(request.stream),
      include_usage_(request.include_usage),
      num_answers_(request.n) {
  view_.logprobs = request.call.sampling.logprobs >= 0;
  view_.token_ids = request.return_token_ids || generator_->tokenizer() == nullptr;
  header_ = {.id = NewId(), .created = absl::ToUnixSeconds(absl::Now()), .model = std::move(model_name)};
}

// All prompts are checked before the first is started.
absl::Status CompletionCall::Prepare(CompletionRequest request) {
  for (auto& prompt : request.prompts) {
    GenerateCall call = request.call;
    call.prompt = std::move(prompt);
    auto plan = generator_->Prepare(std::move(call));
    if (!plan.ok()) return plan.status();
    plans_.push_back(std::move(*plan));
  }
  num_running_ = static_cast<int>(plans_.size()) * num_answers_;
  has_sent_.assign(num_running_, false);
  for (int i = 0; i < num_running_ && !is_stream_; ++i) choices_.push_back(NewPart(i));
  return absl::OkStatus();
}

void CompletionCall::Start() {
  const int num_choices = static_cast<int>(plans_.size()) * num_answers_;
  for (int i = 0; i < num_choices; ++i) {
    {
      std::lock_guard lock(mutex_);
      if (is_over_ || is_cancelled_) return;
    }
    auto generation =
        generator_->Start(plans_[i / num_answers_], static_cast<uint32_t>(i % num_answers_),
                          [call = shared_from_this(), i](GenerateEvent event) { call->OnEvent(i, std::move(event)); });
    if (!generation.ok()) {
      {
        std::lock_guard lock(mutex_);
        FailAnswer(generation.status());
      }
      return CancelAll();
    }
    bool is_unwanted;
    {
      std::lock_guard lock(mutex_);
      generations_.push_back(*generation);
      is_unwanted = is_over_ || is_cancelled_;
    }
    if (is_unwanted) (*generation)->Cancel();
  }
  std::lock_guard lock(mutex_);
  if (is_stream_ && !is_over_) BeginStream();
}

// NOTE: generations are cancelled outside the lock, which their sinks take.
void CompletionCall::CancelAll() {
  std::vector<std::shared_ptr<Generation>> generations;
  {
    std::lock_guard lock(mutex_);
    is_cancelled_ = true;
    generations.swap(generations_);
  }
  for (const auto& generation : generations) generation->Cancel();
}

void CompletionCall::OnEvent(int choice_idx, GenerateEvent event) {
  bool has_failed = false;
  {
    std::lock_guard lock(mutex_);
    if (is_over_) return;
    const FinishReason reason = event.finish_reason;
    if (reason == FinishReason::kError) {
      has_failed = true;
      FailAnswer(event.error);
    } else {
      completion_tokens_ += event.usage.completion_tokens;
      is_stream_ ? StreamEvent(choice_idx, std::move(event)) : CollectEvent(choice_idx, std::move(event));
      if (reason != FinishReason::kNone && --num_running_ == 0) FinishAnswer();
    }
  }
  if (has_failed) CancelAll();
}

void CompletionCall::StreamEvent(int choice_idx, GenerateEvent event) {
  if (!IsWorthAChunk(event, view_)) return;
  BeginStream();
  CompletionPart part = NewPart(choice_idx);
  if (has_sent_[choice_idx]) part.prompt = nullptr;
  has_sent_[choice_idx] = true;
  part.text = std::move(event.text);
  part.scores = std::move(event.scores);
  part.tokens = std::move(event.tokens);
  part.finish_reason = event.finish_reason;
  ordered_json chunk = CompletionJson(header_, ordered_json::array({PartJson(part, view_)}));
  if (include_usage_) chunk["usage"] = nullptr;
  responder_->Write(SseEvent(Dump(chunk)));
}

void CompletionCall::CollectEvent(int choice_idx, GenerateEvent event) {
  CompletionPart& choice = choices_[choice_idx];
  choice.text += event.text;
  choice.scores.insert(choice.scores.end(), std::make_move_iterator(event.scores.begin()),
                       std::make_move_iterator(event.scores.end()));
  choice.tokens.insert(choice.tokens.end(), event.tokens.begin(), event.tokens.end());
  choice.finish_reason = event.finish_reason;
}

void CompletionCall::BeginStream() {
  if (std::exchange(has_begun_, true)) return;
  responder_->Begin({.content_type = "text/event-stream", .body = "", .headers = {{"Cache-Control", "no-cache"}}});
}

void CompletionCall::FinishAnswer() {
  is_over_ = true;
  generations_.clear();
  if (!is_stream_) {
    ordered_json choices = ordered_json::array();
    for (const CompletionPart& choice : choices_) choices.push_back(PartJson(choice, view_));
    ordered_json json = CompletionJson(header_, std::move(choices));
    json["usage"] = UsageJson(TotalUsage());
    return responder_->Respond({.body = Dump(json), .headers = {}});
  }
  if (include_usage_) {
    ordered_json chunk = CompletionJson(header_, ordered_json::array());
    chunk["usage"] = UsageJson(TotalUsage());
    responder_->Write(SseEvent(Dump(chunk)));
  }
  responder_->Write(SseEvent("[DONE]"));
  responder_->End();
}

void CompletionCall::FailAnswer(const absl::Status& status) {
  if (std::exchange(is_over_, true)) return;
  if (!has_begun_) return responder_->Respond(ErrorResponse(status));
  responder_->Write(SseEvent(Dump(ErrorJson(status))));
  responder_->End();
}

Usage CompletionCall::TotalUsage() const {
  Usage usage{.completion_tokens = completion_tokens_};
  for (const auto& plan : plans_) usage.prompt_tokens += static_cast<int64_t>(plan->prompt.size());
  return usage;
}

CompletionPart CompletionCall::NewPart(int choice_idx) const {
  CompletionPart part;
  part.index = choice_idx;
  if (view_.token_ids) part.prompt = &plans_[choice_idx / num_answers_]->prompt;
  return part;
}

}  // namespace cachalot
