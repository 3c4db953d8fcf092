// LiveCalls: how many calls gRPC has not done with.
#ifndef CACHALOT_SERVER_GRPC_LIVE_CALLS_H_
#define CACHALOT_SERVER_GRPC_LIVE_CALLS_H_

#include "absl/base/thread_annotations.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/mutex.h"

namespace cachalot {

// Any thread.
class LiveCalls {
 public:
  void Begin() {
    MutexLock lock(&mutex_);
    ++count_;
  }
  void End() {
    MutexLock lock(&mutex_);
    if (--count_ == 0) is_none_.NotifyAll();
  }
  // Waits until there is none, but not longer than `timeout`.
  void AwaitNone(absl::Duration timeout) {
    const absl::Time deadline = absl::Now() + timeout;
    MutexLock lock(&mutex_);
    while (count_ > 0 && is_none_.WaitUntil(&mutex_, deadline)) {
    }
  }

 private:
  Mutex mutex_;
  CondVar is_none_;
  int count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_LIVE_CALLS_H_
