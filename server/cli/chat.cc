// Turn by turn: a line in, a stream of events out.
#include "server/cli/chat.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/cli/serving.h"
#include "server/http/http_client.h"

namespace cachalot {
namespace {

using nlohmann::json;

std::atomic<bool> g_is_interrupted = false;  // NOTE: a signal handler can reach nothing else

void OnInterrupt(int) { g_is_interrupted = true; }

// Ctrl-C ends an answer; while a line is read, the read.
void CatchInterrupts() {
  struct sigaction action = {};
  action.sa_handler = OnInterrupt;  // NOTE: without SA_RESTART: a read returns
  sigaction(SIGINT, &action, nullptr);
}

// A member of what may be no object; null if there is none. NOTE: nlohmann's own accessors throw.
const json& Member(const json& value, const char* key) {
  static const json nothing;
  if (!value.is_object()) return nothing;
  const auto found = value.find(key);
  return found == value.end() ? nothing : *found;
}

// What a server says of an error, in one line.
std::string ErrorText(int status, const std::string& body) {
  const json answer = json::parse(body, nullptr, /*allow_exceptions=*/false);
  const json& error = Member(answer, "error");
  const json& message = error.is_object() ? Member(error, "message") : error;
  if (message.is_string()) return message.get<std::string>();
  return absl::StrCat("the server answered ", status);
}

// Prints an answer as its events come.
class AnswerPrinter {
 public:
  AnswerPrinter() : is_terminal_(isatty(STDOUT_FILENO) != 0) {}

  // Bytes of a stream of server-sent events, however cut; lines may end in CR LF.
  void Feed(std::string_view bytes) {
    for (const char byte : bytes) {
      if (byte != '\r') events_.push_back(byte);
    }
    size_t at = 0, end;
    while ((end = events_.find("\n\n", at)) != std::string::npos) {
      const std::string_view event = std::string_view(events_).substr(at, end - at);
      if (event.substr(0, 6) == "data: ") OnData(event.substr(6));
      at = end + 2;
    }
    events_.erase(0, at);
  }

  void Finish() {
    if (is_thinking_ && is_terminal_) std::fputs("\033[0m", stdout);
    std::fputs("\n", stdout);
    std::fflush(stdout);
    if (num_tokens_ == 0) return;
    const double seconds = absl::ToDoubleSeconds(absl::Now() - first_);
    const double rate = num_tokens_ > 1 && seconds > 0 ? static_cast<double>(num_tokens_ - 1) / seconds : 0;
    std::fprintf(stderr, "[%lld tokens, %.1f tok/s, first after %.2f s%s]\n", static_cast<long long>(num_tokens_), rate,
                 absl::ToDoubleSeconds(first_ - start_), finish_reason_ == "length" ? ", cut off by length" : "");
  }

  const std::string& text() const { return text_; }
  const std::string& error() const { return error_; }

 private:
  void OnData(std::string_view data) {
    if (data == "[DONE]") return;
    const json event = json::parse(data, nullptr, /*allow_exceptions=*/false);
    if (!event.is_object()) {
      error_ = "the server sent an event that is no JSON object";
      return;
    }
    if (event.contains("error")) error_ = ErrorText(500, std::string(data));
    const json& num_tokens = Member(Member(event, "usage"), "completion_tokens");
    if (num_tokens.is_number_integer()) num_tokens_ = num_tokens.get<int64_t>();
    const json& choices = Member(event, "choices");
    if (!choices.is_array() || choices.empty()) return;
    if (first_ == absl::InfiniteFuture()) first_ = absl::Now();
    const json& delta = Member(choices[0], "delta");
    Print(Member(delta, "reasoning_content"), true);
    Print(Member(delta, "content"), false);
    if (const json& reason = Member(choices[0], "finish_reason"); reason.is_string()) finish_reason_ = reason;
  }

  void Print(const json& piece, bool is_thinking) {
    if (!piece.is_string() || piece.get_ref<const std::string&>().empty()) return;
    if (is_thinking != is_thinking_) {
      if (is_terminal_) std::fputs(is_thinking ? "\033[2m" : "\033[0m", stdout);
      if (!is_thinking) std::fputs("\n\n", stdout);
      is_thinking_ = is_thinking;
    }
    const std::string& text = piece.get_ref<const std::string&>();
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
    if (!is_thinking) text_ += text;
  }

  const bool is_terminal_;
  const absl::Time start_ = absl::Now();
  absl::Time first_ = absl::InfiniteFuture();
  std::string events_, text_, error_, finish_reason_;
  int64_t num_tokens_ = 0;
  bool is_thinking_ = false;
};

class Conversation {
 public:
  Conversation(const ChatOptions& options, HttpClient client, std::string model)
      : options_(options), client_(std::move(client)), model_(std::move(model)) {
    Reset();
  }

  void Reset() {
    messages_ = json::array();
    if (!options_.system.empty()) messages_.push_back({{"role", "system"}, {"content", options_.system}});
  }

  // False if the turn failed: it is then as if it had not been said.
  bool Say(const std::string& line) {
    messages_.push_back({{"role", "user"}, {"content", line}});
    json request = {{"model", model_}, {"messages", messages_}, {"stream", true}};
    request["stream_options"] = {{"include_usage", true}, {"continuous_usage_stats", true}};
    if (options_.max_tokens > 0) request["max_completion_tokens"] = options_.max_tokens;
    if (options_.temperature.has_value()) request["temperature"] = *options_.temperature;
    if (options_.thinking) request["chat_template_kwargs"] = {{"thinking", true}};
    AnswerPrinter printer;
    g_is_interrupted = false;
    const auto response = client_.Post(
        "/v1/chat/completions", request.dump(-1, ' ', false, json::error_handler_t::replace),
        [&printer](int status, std::string_view more) {
          if (status == 200) printer.Feed(more);
          return true;
        },
        [] { return g_is_interrupted.load(); });
    const bool is_interrupted = absl::IsCancelled(response.status());
    std::string error = printer.error();
    if (!response.ok() && !is_interrupted) error = std::string(response.status().message());
    if (response.ok() && response->status != 200) error = ErrorText(response->status, response->body);
    if (error.empty()) {
      printer.Finish();
      messages_.push_back({{"role", "assistant"}, {"content", printer.text()}});
      return true;
    }
    messages_.erase(messages_.size() - 1);
    std::fprintf(stderr, "cachalot: %s\n", error.c_str());
    return false;
  }

 private:
  const ChatOptions& options_;
  const HttpClient client_;
  const std::string model_;
  json messages_;
};

// The name of the model to talk to; one line to stderr if there is none.
absl::StatusOr<std::string> FindModel(const HttpClient& client, const std::string& wanted) {
  const auto response = client.Get("/v1/models");
  if (!response.ok()) return response.status();
  if (response->status != 200) return absl::UnavailableError(ErrorText(response->status, response->body));
  if (!wanted.empty()) return wanted;
  const json models = json::parse(response->body, nullptr, /*allow_exceptions=*/false);
  const json& data = Member(models, "data");
  const json& id = data.is_array() && !data.empty() ? Member(data[0], "id") : Member(json(), "id");
  if (id.is_string()) return id.get<std::string>();
  return absl::UnavailableError("the server names no model");
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "cachalot: %s\n", std::string(status.message()).c_str());
  return 1;
}

// OpenAI's clients are given an address that ends in /v1, or /v1/; ours are the paths below what is before that.
std::string WithoutVersion(std::string_view url) {
  const auto strip_slashes = [&url] { url = url.substr(0, url.find_last_not_of('/') + 1); };
  strip_slashes();
  if (url.ends_with("/v1")) url.remove_suffix(3);
  strip_slashes();
  return std::string(url);
}

int Talk(const ChatOptions& options, const std::string& url) {
  absl::StatusOr<HttpClient> client = HttpClient::Create(WithoutVersion(url));
  if (!client.ok()) return Fail(client.status());
  absl::StatusOr<std::string> model = FindModel(*client, options.model);
  if (!model.ok()) return Fail(model.status());
  const bool is_interactive = isatty(STDIN_FILENO) != 0;
  if (is_interactive) std::fprintf(stderr, "Talking to %s. /reset forgets, /exit leaves.\n", model->c_str());
  Conversation conversation(options, *std::move(client), *std::move(model));
  CatchInterrupts();
  bool has_failed = false;
  for (std::string line;;) {
    if (is_interactive) std::fputs("> ", stderr);
    if (!std::getline(std::cin, line)) break;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line == "/exit") break;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (line == "/reset") {
      conversation.Reset();
      continue;
    }
    has_failed = !conversation.Say(line) || has_failed;
  }
  return has_failed ? 1 : 0;
}

}  // namespace

int Chat(const ChatOptions& options) {
  if (!options.url.empty()) return Talk(options, options.url);
  ServeOptions serve = options.serve;
  serve.host = "127.0.0.1";
  serve.port = 0;
  serve.grpc_port = -1;
  serve.log_requests = RequestLog::kNone;
  SetUpLogging(LogFormat::kText, "warning");
  Serving serving(serve);
  absl::Status status = serving.Bind();
  if (status.ok()) status = serving.Load();
  if (status.ok()) status = serving.Start();
  if (!status.ok()) return Fail(status);
  const int code = Talk(options, absl::StrCat("http://127.0.0.1:", serving.http_port()));
  serving.Stop();
  return code;
}

}  // namespace cachalot
