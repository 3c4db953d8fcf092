// Reading JSON that nobody vouches for: no exceptions, bounded depth and size, no duplicate keys.
#ifndef CACHALOT_ENGINE_MODEL_JSON_FILE_H_
#define CACHALOT_ENGINE_MODEL_JSON_FILE_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace cachalot {

struct JsonLimits {
  int max_depth = 16;              // nested objects and arrays
  int64_t max_values = 4'000'000;  // values in all, which bounds what the parsed form may take
};

// The parsed text. InvalidArgument, "FILE: what is wrong", for text that is not one JSON value, for a key that occurs
// twice in an object, and beyond the limits.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, const std::string& file, const JsonLimits& limits);

// The bytes of a regular file. NotFound when there is none, InvalidArgument when it is longer than `max_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes);

// A name from a file as one line of ASCII, cut after 200 bytes.
std::string Printable(absl::string_view text);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_JSON_FILE_H_
