// Errors as OpenAI's API writes them: the one mapping from absl::Status to HTTP.
#ifndef CACHALOT_SERVER_HTTP_OPENAI_ERROR_H_
#define CACHALOT_SERVER_HTTP_OPENAI_ERROR_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "server/http/http_server.h"

namespace cachalot {

int HttpStatus(absl::StatusCode code);

// {"error": {"message", "type", "param", "code"}}: all four keys, null where there is nothing to say. `param` and
// `code` are the status's (see request_error.h).
nlohmann::ordered_json ErrorJson(const absl::Status& status);

// The same as a response; a full queue asks to come back later (429 with Retry-After).
HttpResponse ErrorResponse(const absl::Status& status);

// For errors that have an HTTP status of their own (404 of a path, 408, 413...).
HttpResponse HttpErrorResponse(int status, std::string_view message);

// JSON text; bytes that are not UTF-8 become U+FFFD.
std::string Dump(const nlohmann::ordered_json& json);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_OPENAI_ERROR_H_
