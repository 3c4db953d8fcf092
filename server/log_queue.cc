// One thread that waits for messages, and then for room to write them.
#include "server/log_queue.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace cachalot {
namespace {

constexpr absl::Duration kFlushTime = absl::Milliseconds(300), kStopTime = absl::Milliseconds(200);
constexpr absl::Duration kPollTime = absl::Milliseconds(50);
constexpr size_t kMaxWrite = 4096;  // PIPE_BUF: a pipe that has room has that much
constexpr size_t kMessageBytes = sizeof(spdlog::details::log_msg_buffer);

const char* Color(spdlog::level::level_enum level) {
  if (level >= spdlog::level::err) return "\033[31m\033[1m";
  return level == spdlog::level::warn ? "\033[33m\033[1m" : "\033[32m";
}

}  // namespace

LogQueue::LogQueue(int fd, std::unique_ptr<spdlog::formatter> formatter)
    : fd_(fd), is_terminal_(isatty(fd) != 0), formatter_(std::move(formatter)), thread_([this] { Run(); }) {}

LogQueue::~LogQueue() {
  {
    MutexLock lock(&mutex_);
    stop_at_ = absl::Now() + kStopTime;
    changed_.NotifyAll();
  }
  thread_.join();
}

void LogQueue::log(const spdlog::details::log_msg& message) {
  const size_t bytes = kMessageBytes + message.payload.size();
  MutexLock lock(&mutex_);
  // NOTE: one that is larger than all the queue waits alone.
  if (!waiting_.empty() && waiting_bytes_ + bytes > kMaxBytes) {
    ++num_dropped_;
    return;
  }
  waiting_.emplace_back(message);
  waiting_bytes_ += bytes;
  ++num_logged_;
  changed_.NotifyAll();
}

void LogQueue::flush() {
  const absl::Time deadline = absl::Now() + kFlushTime;
  MutexLock lock(&mutex_);
  const uint64_t logged = num_logged_;
  while (num_written_ < logged && changed_.WaitUntil(&mutex_, deadline)) {
  }
}

uint64_t LogQueue::num_dropped() const {
  MutexLock lock(&mutex_);
  return num_dropped_;
}

void LogQueue::Run() {
  uint64_t num_told = 0;  // dropped messages that were mentioned
  while (true) {
    Messages messages;
    uint64_t num_dropped;
    {
      MutexLock lock(&mutex_);
      while (waiting_.empty() && stop_at_ == absl::InfiniteFuture()) changed_.Wait(&mutex_);
      if (waiting_.empty()) return;
      messages.swap(waiting_);
      waiting_bytes_ = 0;
      num_dropped = num_dropped_;
    }
    for (const auto& message : messages) {
      if (!Write(message)) return;
    }
    if (num_dropped > num_told) {
      const std::string text = absl::StrCat("the log was not read fast enough: ", num_dropped - num_told,
                                            " messages were dropped\tdropped=", num_dropped - num_told);
      num_told = num_dropped;
      if (!Write({"cachalot", spdlog::level::warn, text})) return;
    }
    MutexLock lock(&mutex_);
    num_written_ += messages.size();
    changed_.NotifyAll();
  }
}

// False when it is time to end.
bool LogQueue::Write(const spdlog::details::log_msg& message) {
  spdlog::memory_buf_t line;
  formatter_->format(message, line);
  const std::string_view text(line.data(), line.size());
  if (!is_terminal_ || message.color_range_end <= message.color_range_start) return WriteAll(text);
  const size_t begin = message.color_range_start, end = message.color_range_end;
  return WriteAll(text.substr(0, begin)) && WriteAll(Color(message.level)) &&
         WriteAll(text.substr(begin, end - begin)) && WriteAll("\033[m") && WriteAll(text.substr(end));
}

bool LogQueue::WriteAll(std::string_view bytes) {
  while (!bytes.empty()) {
    if (!AwaitRoom()) return false;
    const ssize_t written = write(fd_, bytes.data(), std::min(bytes.size(), kMaxWrite));
    if (written < 0 && errno != EINTR && errno != EAGAIN) return true;  // nobody reads it any more
    bytes.remove_prefix(std::max<ssize_t>(written, 0));
  }
  return true;
}

// NOTE: a pipe may be somebody else's too, so that we may not make it one that does not block.
bool LogQueue::AwaitRoom() const {
  while (true) {
    pollfd room = {.fd = fd_, .events = POLLOUT, .revents = 0};
    if (poll(&room, 1, static_cast<int>(absl::ToInt64Milliseconds(kPollTime))) != 0) return true;
    MutexLock lock(&mutex_);
    if (absl::Now() >= stop_at_) return false;
  }
}

}  // namespace cachalot
