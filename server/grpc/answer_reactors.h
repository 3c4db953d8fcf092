// StreamReactor and UnaryReactor: answers as they are made, answers at once.
#ifndef CACHALOT_SERVER_GRPC_ANSWER_REACTORS_H_
#define CACHALOT_SERVER_GRPC_ANSWER_REACTORS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/grpc/call_reactor.h"
#include "server/grpc/grpc_messages.h"
#include "server/grpc/proto_calls.h"
#include "server/request_error.h"

namespace cachalot {

// Log-probabilities that a response holds.
template <typename Response>
size_t NumScores(const Response& response) {
  size_t count = 0;
  for (const auto& logprob : response.logprobs()) count += 1 + logprob.top_size();
  return count;
}

// Writes a Response (v1::CompleteResponse or v1::ChatResponse) an event. At most so many wait for a slow client, and
// one an answer: later events are added to those.
template <typename Response>
class StreamReactor final : public CallReactor<grpc::ServerWriteReactor<grpc::ByteBuffer>> {
 public:
  StreamReactor(grpc::CallbackServerContext* context, LiveCalls* live_calls) : CallReactor(context, live_calls) {}

  void OnWriteDone(bool ok) override {
    if (!ok) return OnWriteFailed();
    {
      MutexLock lock(&mutex_);
      is_writing_ = false;
    }
    Advance();
  }

 private:
  static constexpr size_t kMaxWaiting = 64;
  // Of a response; with 20 alternatives each under a MiB, and clients take 4 by default.
  static constexpr int kMaxMergedLogprobs = 1024;

  void OnWriteFailed() {
    {
      MutexLock lock(&mutex_);
      is_writing_ = false;
    }
    OnCancel();
  }

  absl::Status Take(int index, GenerateEvent event) override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const TokenScore& score : event.scores) num_held_scores_ += 1 + score.top.size();
    if (num_held_scores_ > kMaxHeldScores) {
      return absl::ResourceExhaustedError("the client took its answer too slowly");
    }
    Response* response = waiting_.size() < kMaxWaiting ? nullptr : LastWaiting(index);
    if (response == nullptr || response->logprobs_size() >= kMaxMergedLogprobs) {
      response = &waiting_.emplace_back(std::move(spare_));
      response->Clear();
      response->set_index(index);
    }
    Append(std::move(event), response);
    return absl::OkStatus();
  }

  Response* LastWaiting(int index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (auto response = waiting_.rbegin(); response != waiting_.rend(); ++response) {
      if (response->index() == index) return &*response;
    }
    return nullptr;
  }

  // Responses that wait share packets: gRPC may hold back those that it is told will be followed.
  void Advance() override {
    bool has_next = false, is_followed = false;
    std::optional<absl::Status> final_status;
    {
      MutexLock lock(&mutex_);
      if (is_writing_ || has_finished_) return;
      if (is_cancelled_) {
        final_status = absl::CancelledError("the call was cancelled");
      } else if (waiting_.empty()) {
        final_status = status_;
      } else {
        has_next = is_writing_ = true;
        writing_.Swap(&waiting_.front());
        spare_ = std::move(waiting_.front());
        waiting_.pop_front();
        num_held_scores_ -= NumScores(writing_);
        is_followed = !waiting_.empty();
        if (!is_followed && status_.has_value() && status_->ok()) final_status = status_;
      }
      has_finished_ = final_status.has_value();
    }
    if (has_next) buffer_ = SerializeMessage(writing_);
    if (has_next && final_status.has_value()) {
      StartWriteAndFinish(&buffer_, grpc::WriteOptions(), grpc::Status::OK);
    } else if (has_next) {
      StartWrite(&buffer_, is_followed ? grpc::WriteOptions().set_buffer_hint() : grpc::WriteOptions());
    } else if (final_status.has_value()) {
      Finish(ToGrpcStatus(*final_status, context_));
    }
  }

  std::deque<Response> waiting_ ABSL_GUARDED_BY(mutex_);
  Response spare_ ABSL_GUARDED_BY(mutex_);              // one that was written, for its memory
  size_t num_held_scores_ ABSL_GUARDED_BY(mutex_) = 0;  // in waiting_
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  Response writing_;  // whose is_writing_ it is, and so is buffer_
  grpc::ByteBuffer buffer_;
};

// Gathers all answers in a Response (v1::CompleteUnaryResponse or v1::ChatUnaryResponse).
template <typename Response>
class UnaryReactor final : public CallReactor<grpc::ServerUnaryReactor> {
 public:
  // gRPC keeps `buffer` until OnDone.
  UnaryReactor(grpc::CallbackServerContext* context, LiveCalls* live_calls, grpc::ByteBuffer* buffer)
      : CallReactor(context, live_calls), buffer_(buffer) {}

 private:
  absl::Status Take(int index, GenerateEvent event) override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const TokenScore& score : event.scores) num_scores_ += 1 + score.top.size();
    if (num_scores_ > kMaxHeldScores) {
      return FieldError("logprobs", absl::StrCat("the answer has more than ", kMaxHeldScores,
                                                 " log-probabilities: stream it, or ask for less at once"));
    }
    while (response_.answers_size() <= index) response_.add_answers()->set_index(response_.answers_size() - 1);
    v1::Usage* usage = response_.mutable_usage();
    usage->set_prompt_tokens(std::max<int64_t>(usage->prompt_tokens(), event.usage.prompt_tokens));
    usage->set_completion_tokens(usage->completion_tokens() + event.usage.completion_tokens);
    // As the prompt counts once: for the answer that computed most of it.
    if (event.finish_reason != FinishReason::kNone) {
      const int64_t cached = event.usage.cached_tokens;
      usage->set_cached_tokens(std::exchange(has_ended_, true) ? std::min<int64_t>(usage->cached_tokens(), cached)
                                                               : cached);
    }
    Append(std::move(event), response_.mutable_answers(index));
    return absl::OkStatus();
  }

  void Advance() override {
    absl::Status status;
    {
      MutexLock lock(&mutex_);
      if (has_finished_ || (!is_cancelled_ && !status_.has_value())) return;
      status = is_cancelled_ ? absl::CancelledError("the call was cancelled") : *status_;
      has_finished_ = true;
    }
    if (status.ok()) *buffer_ = SerializeMessage(response_);
    Finish(ToGrpcStatus(status, context_));
  }

  Response response_;  // guarded by mutex_ until has_finished_
  size_t num_scores_ ABSL_GUARDED_BY(mutex_) = 0;
  bool has_ended_ ABSL_GUARDED_BY(mutex_) = false;  // one of its answers
  grpc::ByteBuffer* const buffer_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_ANSWER_REACTORS_H_
