// LoadingLog: a line every few seconds about how far a large checkpoint's weights have come.
#ifndef CACHALOT_ENGINE_LOADING_LOG_H_
#define CACHALOT_ENGINE_LOADING_LOG_H_

#include <cstdint>
#include <mutex>
#include <thread>

#include "absl/time/time.h"
#include "kernels/ops.h"

namespace cachalot {

class LoadingLog {
 public:
  // Reads ops.weight_bytes_copied() from a thread of its own until destroyed; `total` bytes are to come.
  LoadingLog(const Ops& ops, int64_t total, absl::Duration period = absl::Seconds(2));
  ~LoadingLog();
  LoadingLog(const LoadingLog&) = delete;
  LoadingLog& operator=(const LoadingLog&) = delete;

 private:
  std::timed_mutex running_;  // held by the owner until the end
  std::thread thread_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_LOADING_LOG_H_
