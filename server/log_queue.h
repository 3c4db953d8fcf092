// LogQueue: spdlog's way to stderr that keeps nobody waiting: lines are queued, and written by a thread of its own.
#ifndef CACHALOT_SERVER_LOG_QUEUE_H_
#define CACHALOT_SERVER_LOG_QUEUE_H_

#include <spdlog/details/log_msg_buffer.h>
#include <spdlog/formatter.h>
#include <spdlog/sinks/sink.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "server/mutex.h"

namespace cachalot {

// Whoever reads the log may have stopped reading: what does not fit the queue then is dropped, counted, and, when there
// is room again, mentioned. Any thread.
class LogQueue : public spdlog::sinks::sink {
 public:
  static constexpr size_t kMaxBytes = 1 << 20;  // of messages that wait

  // Writes to `fd`, which stays open as long as this lives.
  LogQueue(int fd, std::unique_ptr<spdlog::formatter> formatter);
  // Writes what waits, as long as somebody reads it.
  ~LogQueue() override;

  void log(const spdlog::details::log_msg& message) override;
  // Waits until what was logged before has been written, but not for long.
  void flush() override;
  // The formatter is the constructor's.
  void set_pattern(const std::string&) override {}
  void set_formatter(std::unique_ptr<spdlog::formatter>) override {}

  uint64_t num_dropped() const;

 private:
  using Messages = std::deque<spdlog::details::log_msg_buffer>;

  void Run();
  bool Write(const spdlog::details::log_msg& message);
  bool WriteAll(std::string_view bytes);
  bool AwaitRoom() const;

  const int fd_;
  const bool is_terminal_;
  const std::unique_ptr<spdlog::formatter> formatter_;  // the thread's

  mutable Mutex mutex_;
  CondVar changed_;
  Messages waiting_ ABSL_GUARDED_BY(mutex_);
  size_t waiting_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t num_logged_ ABSL_GUARDED_BY(mutex_) = 0;  // that were not dropped
  uint64_t num_written_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t num_dropped_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time stop_at_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();  // nothing is written after that

  std::thread thread_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_LOG_QUEUE_H_
