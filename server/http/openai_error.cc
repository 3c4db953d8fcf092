// Status codes, error types and codes of OpenAI's API.
#include "server/http/openai_error.h"

#include "server/request_error.h"
#include "server/text/json_text.h"

namespace cachalot {
namespace {

using nlohmann::ordered_json;

constexpr char kRetryAfterSeconds[] = "1";

const char* ErrorType(int http_status) {
  if (http_status == 429) return "rate_limit_error";
  return http_status < 500 ? "invalid_request_error" : "server_error";
}

const char* DefaultCode(int http_status) {
  switch (http_status) {
    case 429: return "rate_limit_exceeded";
    case 503: return "service_unavailable";
    case 504: return "deadline_exceeded";
    default: return "";
  }
}

ordered_json TextOrNull(std::string text) {
  return text.empty() ? ordered_json(nullptr) : ordered_json(std::move(text));
}

ordered_json MakeError(int http_status, std::string_view message, std::string param, std::string code) {
  if (code.empty()) code = DefaultCode(http_status);
  ordered_json error;
  error["message"] = std::string(message);
  error["type"] = ErrorType(http_status);
  error["param"] = TextOrNull(std::move(param));
  error["code"] = TextOrNull(std::move(code));
  return ordered_json{{"error", std::move(error)}};
}

HttpResponse MakeResponse(int http_status, const ordered_json& error) {
  HttpResponse response{.status = http_status, .body = Dump(error), .headers = {}};
  response.closes = http_status == 503;  // lest the client keep to a server that goes
  if (http_status == 429) response.headers.emplace_back("Retry-After", kRetryAfterSeconds);
  return response;
}

}  // namespace

int HttpStatus(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk: return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition: return 400;
    case absl::StatusCode::kUnauthenticated: return 401;
    case absl::StatusCode::kPermissionDenied: return 403;
    case absl::StatusCode::kNotFound: return 404;
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kAborted: return 409;
    case absl::StatusCode::kResourceExhausted: return 429;
    case absl::StatusCode::kCancelled: return 499;
    case absl::StatusCode::kUnimplemented: return 501;
    case absl::StatusCode::kUnavailable: return 503;
    case absl::StatusCode::kDeadlineExceeded: return 504;
    default: return 500;
  }
}

ordered_json ErrorJson(const absl::Status& status) {
  const absl::string_view message = status.message();
  return MakeError(HttpStatus(status.code()), std::string_view(message.data(), message.size()), ErrorField(status),
                   ErrorCode(status));
}

HttpResponse ErrorResponse(const absl::Status& status) {
  return MakeResponse(HttpStatus(status.code()), ErrorJson(status));
}

HttpResponse HttpErrorResponse(int status, std::string_view message) {
  return MakeResponse(status, MakeError(status, message, "", ""));
}

std::string Dump(const ordered_json& json) {
  return EscapeLineEnds(json.dump(-1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace));
}

}  // namespace cachalot
