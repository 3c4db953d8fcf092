// JSON from clients: parsing with limits, and reading typed fields of an object.
#ifndef CACHALOT_SERVER_HTTP_JSON_FIELDS_H_
#define CACHALOT_SERVER_HTTP_JSON_FIELDS_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace cachalot {

// A body that must be one JSON object, in time that grows as its length does. InvalidArgument, saying where, for
// anything else: not JSON, ill-formed UTF-8, nested deeper than 64, more than 200,000 objects and arrays.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view body);

// Reads fields of one object. A field that is absent or null leaves its target alone and answers false; so does a
// wrong one, and the first such is what status() says, naming the field. `prefix` goes before field names
// ("stream_options."). The object must outlive this.
class JsonFields {
 public:
  explicit JsonFields(const nlohmann::json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  bool Read(const char* name, bool* value);
  bool Read(const char* name, float* value);
  bool Read(const char* name, std::string* value);
  // An integer within [low, high]. Here and below 16.0 is an integer too.
  bool Read(const char* name, int low, int high, int* value);
  // Any integer of 64 bits, signed or not; a negative one wraps.
  bool Read(const char* name, uint64_t* value);
  // Token ids: integers that fit.
  bool Read(const char* name, std::vector<int32_t>* value);
  // One string or an array of strings.
  bool ReadStrings(const char* name, std::vector<std::string>* value);

  // The field as it is, nullptr if absent or null.
  const nlohmann::json* Find(const char* name) const;
  bool Fail(const char* name, std::string_view message);
  // The status of another reader, of an object within this one.
  void Take(const absl::Status& status) { status_.Update(status); }
  const absl::Status& status() const { return status_; }

 private:
  const nlohmann::json& object_;
  const std::string prefix_;
  absl::Status status_;
};

// Appends an array of token ids; false if it is anything else.
bool AppendTokenIds(const nlohmann::json& array, std::vector<int32_t>* ids);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_JSON_FIELDS_H_
