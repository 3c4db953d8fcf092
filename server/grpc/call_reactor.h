// CallReactor: a call that generates: events from the engine's output thread meet gRPC's threads.
#ifndef CACHALOT_SERVER_GRPC_CALL_REACTOR_H_
#define CACHALOT_SERVER_GRPC_CALL_REACTOR_H_

#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "server/grpc/live_calls.h"
#include "server/mutex.h"
#include "server/text/generator.h"

namespace cachalot {

// What streams and unary calls share: n generations, their end, cancellation. `Base` is gRPC's reactor. Deletes itself
// when gRPC is done with it and the generations have ended: both call it. gRPC is called without the lock, because it
// may call back at once.
template <typename Base>
class CallReactor : public Base {
 public:
  // Starts `n` answers to `plan`, or fails the call. Once, before gRPC is given the reactor, or Fail instead.
  void Start(Generator* generator, const std::shared_ptr<const GeneratePlan>& plan, int n) {
    {
      MutexLock lock(&mutex_);
      num_running_ = n;
    }
    for (int i = 0; i < n; ++i) {
      auto generation = generator->Start(plan, static_cast<uint32_t>(i), [self = self_, i](GenerateEvent event) {
        self->OnEvent(i, std::move(event));
      });
      if (!generation.ok()) return Fail(generation.status());
      Add(*std::move(generation));
    }
  }

  // Ends the call with an error, after what was already answered.
  void Fail(const absl::Status& status) {
    {
      MutexLock lock(&mutex_);
      if (!status_.has_value()) status_ = status;
    }
    CancelGenerations();
    Advance();
  }

  // The client has gone, its deadline has passed or the server stops.
  void OnCancel() override {
    {
      MutexLock lock(&mutex_);
      is_cancelled_ = true;
    }
    CancelGenerations();
    Advance();
  }

  void OnDone() override {
    {
      MutexLock lock(&mutex_);
      generations_.clear();
    }
    live_calls_->End();
    self_.reset();
  }

 protected:
  // `live_calls` must outlive the server.
  CallReactor(grpc::CallbackServerContext* context, LiveCalls* live_calls)
      : context_(context), live_calls_(live_calls), self_(this) {
    live_calls_->Begin();
  }

  // Keeps an event of answer `index`; an error, which ends the call, when too much is kept.
  virtual absl::Status Take(int index, GenerateEvent event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) = 0;
  // Gives gRPC what is to be given now, if anything.
  virtual void Advance() ABSL_LOCKS_EXCLUDED(mutex_) = 0;

  grpc::CallbackServerContext* const context_;
  LiveCalls* const live_calls_;
  Mutex mutex_;
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mutex_);  // set when no event will be taken any more
  bool is_cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool has_finished_ ABSL_GUARDED_BY(mutex_) = false;

 private:
  // On the engine's output thread.
  void OnEvent(int index, GenerateEvent event) {
    if (event.finish_reason == FinishReason::kError) return Fail(event.error);
    if (event.finish_reason == FinishReason::kCancelled) return Fail(absl::CancelledError("the answer was cancelled"));
    absl::Status taken;
    {
      MutexLock lock(&mutex_);
      if (status_.has_value() || is_cancelled_) return;
      const bool is_last = event.finish_reason != FinishReason::kNone;
      taken = Take(index, std::move(event));
      if (taken.ok() && is_last && --num_running_ == 0) status_ = absl::OkStatus();
    }
    taken.ok() ? Advance() : Fail(taken);
  }

  void Add(std::shared_ptr<Generation> generation) {
    {
      MutexLock lock(&mutex_);
      const bool has_failed = is_cancelled_ || (status_.has_value() && !status_->ok());
      if (!has_failed) {
        generations_.push_back(std::move(generation));
        return;
      }
    }
    generation->Cancel();
  }

  void CancelGenerations() {
    std::vector<std::shared_ptr<Generation>> generations;
    {
      MutexLock lock(&mutex_);
      generations.swap(generations_);
    }
    for (const auto& generation : generations) generation->Cancel();
  }

  std::vector<std::shared_ptr<Generation>> generations_ ABSL_GUARDED_BY(mutex_);
  int num_running_ ABSL_GUARDED_BY(mutex_) = 0;
  std::shared_ptr<CallReactor> self_;  // gRPC's share, until OnDone; not guarded
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_CALL_REACTOR_H_
