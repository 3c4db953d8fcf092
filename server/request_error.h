// What is wrong with a request, carried by absl::Status: which field, and a code that programs can test for.
#ifndef CACHALOT_SERVER_REQUEST_ERROR_H_
#define CACHALOT_SERVER_REQUEST_ERROR_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace cachalot {

// InvalidArgument about `field` of a request (named as clients spell it). `code` is for programs
// ("context_length_exceeded"); empty for the ordinary wrong value.
absl::Status FieldError(std::string_view field, std::string_view message, std::string_view code = "");

// `status` with a field and a code attached; an empty one attaches nothing.
absl::Status WithField(absl::Status status, std::string_view field, std::string_view code = "");

// Ok for the name of the model that is `served`, or none; otherwise NotFound about "model".
absl::Status CheckModelName(const std::string& asked, const std::string& served);

// What was attached, empty if nothing was.
std::string ErrorField(const absl::Status& status);
std::string ErrorCode(const absl::Status& status);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_REQUEST_ERROR_H_
