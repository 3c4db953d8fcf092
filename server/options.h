// Options: the command line and the config file, checked once.
#ifndef CACHALOT_SERVER_OPTIONS_H_
#define CACHALOT_SERVER_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/options.h"
#include "engine/plan.h"
#include "server/logging.h"

namespace cachalot {

// cachalot serve
struct ServeOptions {
  EngineOptions engine;
  std::string host = "127.0.0.1";
  int port = 8000;                // 0: any free one
  int grpc_port = 50051;          // 0: any free one; -1: no gRPC
  std::string served_model_name;  // by default the model directory's name
  std::string chat_template;      // a renderer's name; empty: the one that the checkpoint's template is recognised as
  std::string generation_config = "auto";            // or "none": the checkpoint's defaults of sampling do not count
  bool allow_special_tokens = false;                 // texts of messages may hold special tokens
  absl::Duration drain_timeout = absl::Seconds(30);  // after SIGTERM, for requests in flight
  RequestLog log_requests = RequestLog::kNone;
  LogFormat log_format = LogFormat::kText;
  std::string log_level = "info";
};

// cachalot chat: with a server, or with one of its own that it starts.
struct ChatOptions {
  std::string url;     // http://host:port; empty: `serve` says what to load
  std::string model;   // the name to ask for; empty: the server's first
  std::string system;  // system message; empty: none
  int max_tokens = 0;  // 0: as many as the context holds
  std::optional<float> temperature;
  bool thinking = false;
  ServeOptions serve;
};

// cachalot inspect
struct InspectOptions {
  std::string model_dir;
  bool deep = false;  // reads every weight
};

// Nothing to run: help, the version (exit code 0, text for stdout) or a mistake (text for stderr).
struct ExitNow {
  int code = 0;
  std::string text;
};

using Command = std::variant<ServeOptions, ChatOptions, InspectOptions, PlanOptions, ExitNow>;

// `arguments` are those after the program's name. Values on the command line go before the config file's.
Command ParseCommandLine(std::vector<std::string> arguments);

// A size in bytes, or a share, 0 to 1, of what is free where it is used.
struct MemorySize {
  int64_t bytes = 0;
  double share = 0;
};
// "8GiB", "512 MiB", "2000000" (bytes), or "80%". InvalidArgument for anything else, and for what is nothing at all.
absl::StatusOr<MemorySize> ParseMemory(std::string_view text);

// One line, as `cachalot --version` prints it, without the name.
std::string_view Version();

}  // namespace cachalot

#endif  // CACHALOT_SERVER_OPTIONS_H_
