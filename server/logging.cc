// Two formatters for spdlog.
#include "server/logging.h"

#include <fcntl.h>
#include <spdlog/formatter.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "server/log_queue.h"

namespace cachalot {
namespace {

class JsonFormatter : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    const std::string time =
        absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::FromChrono(message.time), absl::UTCTimeZone());
    const auto level = spdlog::level::to_string_view(message.level);
    const std::string line =
        JsonLogLine(time, {level.data(), level.size()}, {message.payload.data(), message.payload.size()});
    out.append(line.data(), line.data() + line.size());
    out.push_back('\n');
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<JsonFormatter>(); }
};

// spdlog's own pattern, with spaces for tabs.
class TextFormatter : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    pattern_.format(message, out);
    std::replace(out.data(), out.data() + out.size(), '\t', ' ');
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<TextFormatter>(); }

 private:
  spdlog::pattern_formatter pattern_{"%Y-%m-%d %H:%M:%S.%e %^%l%$ %v"};
};

// NOTE: a log must be valid JSON whatever a client sent: what is no UTF-8 is replaced.
std::string Quoted(std::string_view text) {
  return nlohmann::json(std::string(text)).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

void SetUpLogging(LogFormat format, const std::string& level) {
  std::unique_ptr<spdlog::formatter> formatter;
  if (format == LogFormat::kJson) {
    formatter = std::make_unique<JsonFormatter>();
  } else {
    formatter = std::make_unique<TextFormatter>();
  }
  auto queue = std::make_shared<LogQueue>(STDERR_FILENO, std::move(formatter));
  auto logger = std::make_shared<spdlog::logger>("cachalot", std::move(queue));
  logger->set_level(spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::critical);  // what follows may be the end
  spdlog::set_default_logger(std::move(logger));
}

uint64_t NumDroppedLogMessages() {
  uint64_t count = 0;
  for (const auto& sink : spdlog::default_logger_raw()->sinks()) {
    if (const auto* queue = dynamic_cast<const LogQueue*>(sink.get())) count += queue->num_dropped();
  }
  return count;
}

void OpenStandardFiles() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(fd, F_GETFD) < 0 && errno == EBADF) open("/dev/null", O_RDWR);  // the lowest that is free: this one
  }
}

std::string JsonLogLine(std::string_view time, std::string_view level, std::string_view message) {
  std::string line = "{\"time\":" + Quoted(time) + ",\"level\":" + Quoted(level);
  bool is_first = true;
  for (const absl::string_view part : absl::StrSplit(absl::string_view(message.data(), message.size()), '\t')) {
    const size_t equals = part.find('=');
    const bool is_field = !is_first && equals != absl::string_view::npos;
    const std::string key(is_field ? part.substr(0, equals) : "message");
    const std::string value(is_field ? part.substr(equals + 1) : part);
    if (!is_first && !is_field) continue;
    const bool is_json = is_field && nlohmann::json::parse(value, nullptr, /*allow_exceptions=*/false).is_primitive();
    line.append(",").append(Quoted(key)).append(":").append(is_json ? value : Quoted(value));
    is_first = false;
  }
  return line + "}";
}

}  // namespace cachalot
