// The thread that logs.
#include "engine/loading_log.h"

#include <spdlog/spdlog.h>

namespace cachalot {

LoadingLog::LoadingLog(const Ops& ops, int64_t total, absl::Duration period) {
  running_.lock();
  thread_ = std::thread([this, &ops, total, period] {
    while (!running_.try_lock_for(absl::ToChronoMilliseconds(period))) {
      const int64_t copied = ops.weight_bytes_copied();
      if (copied > 0) spdlog::info("weights: {:.1f} of {:.1f} GB", copied * 1e-9, total * 1e-9);
    }
    running_.unlock();
  });
}

LoadingLog::~LoadingLog() {
  running_.unlock();
  thread_.join();
}

}  // namespace cachalot
