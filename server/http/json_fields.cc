// NOTE: nlohmann::json is asked for types before values and parses without exceptions, so that nothing throws.
#include "server/http/json_fields.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/request_error.h"

namespace cachalot {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 64;
constexpr int kMaxContainers = 200'000;

// Finds the first error.
class ErrorFinder : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return true; }
  bool key(string_t&) override { return true; }
  bool end_object() override { return true; }
  bool start_array(size_t) override { return true; }
  bool end_array() override { return true; }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    position_ = position;
    is_overflow_ = error.id == kNumberOverflow;
    return false;
  }
  absl::Status status() const {
    return absl::InvalidArgumentError(
        is_overflow_ ? absl::StrCat("the body holds a number that is out of range before byte ", position_)
                     : absl::StrCat("the body is not valid JSON in UTF-8: error at byte ", position_));
  }

 private:
  static constexpr int kNumberOverflow = 406;
  size_t position_ = 0;
  bool is_overflow_ = false;
};

// What must be known before values are made of a body: how deep it goes and how many objects and arrays it has, each of
// which takes many times its two bytes. Where the body is no JSON, the parser will say so.
absl::Status CheckShape(std::string_view body) {
  int depth = 0, num_containers = 0;
  for (size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (c == '\0') return absl::InvalidArgumentError(absl::StrCat("the body is not JSON: byte ", i, " is NUL"));
    if (c == '"') {
      for (++i; i < body.size() && body[i] != '"'; ++i) i += body[i] == '\\' ? 1 : 0;
    } else if (c == '{' || c == '[') {
      ++num_containers;
      if (++depth > kMaxDepth) {
        return absl::InvalidArgumentError(absl::StrCat("the JSON body is nested deeper than ", kMaxDepth));
      }
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  if (num_containers <= kMaxContainers) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the JSON body holds more than ", kMaxContainers, " objects and arrays"));
}

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

// An integer; one written as a number without a fraction too, as far as doubles count by one. What is beyond 64 bits
// with a sign becomes the largest.
std::optional<int64_t> AsInteger(const json& value) {
  constexpr double kMostExact = 9007199254740992;  // 2^53
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  if (value.is_number_unsigned()) return static_cast<int64_t>(std::min<uint64_t>(value.get<uint64_t>(), kMost));
  if (value.is_number_integer()) return value.get<int64_t>();
  if (!value.is_number_float()) return std::nullopt;
  const double number = value.get<double>();
  if (number != std::floor(number) || std::abs(number) > kMostExact) return std::nullopt;
  return static_cast<int64_t>(number);
}

}  // namespace

absl::StatusOr<json> ParseJsonObject(std::string_view body) {
  if (absl::Status status = CheckShape(body); !status.ok()) return status;
  json value = json::parse(body.begin(), body.end(), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) {
    ErrorFinder finder;
    json::sax_parse(body.begin(), body.end(), &finder);
    return finder.status();
  }
  if (!value.is_object()) return absl::InvalidArgumentError("the body must be a JSON object");
  return value;
}

const json* JsonFields::Find(const char* name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool JsonFields::Fail(const char* name, std::string_view message) {
  const std::string field = prefix_ + name;
  if (status_.ok()) status_ = FieldError(field, absl::StrCat(field, " ", View(message)));
  return false;
}

bool JsonFields::Read(const char* name, bool* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  if (!field->is_boolean()) return Fail(name, "must be a boolean");
  *value = field->get<bool>();
  return true;
}

bool JsonFields::Read(const char* name, float* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  if (!field->is_number()) return Fail(name, "must be a number");
  const double number = field->get<double>();
  if (!(std::abs(number) <= std::numeric_limits<float>::max())) return Fail(name, "is out of range");
  *value = static_cast<float>(number);
  return true;
}

bool JsonFields::Read(const char* name, std::string* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  if (!field->is_string()) return Fail(name, "must be a string");
  *value = *field->get_ptr<const std::string*>();
  return true;
}

bool JsonFields::Read(const char* name, int low, int high, int* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  const std::optional<int64_t> integer = AsInteger(*field);
  if (!integer.has_value()) return Fail(name, "must be an integer");
  if (*integer < low || *integer > high) return Fail(name, absl::StrCat("must be between ", low, " and ", high));
  *value = static_cast<int>(*integer);
  return true;
}

bool JsonFields::Read(const char* name, uint64_t* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  const std::optional<int64_t> integer = AsInteger(*field);
  if (!integer.has_value()) return Fail(name, "must be an integer");
  *value = field->is_number_unsigned() ? field->get<uint64_t>() : static_cast<uint64_t>(*integer);
  return true;
}

bool JsonFields::Read(const char* name, std::vector<int32_t>* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  std::vector<int32_t> ids;
  if (!AppendTokenIds(*field, &ids)) return Fail(name, "must be an array of token ids");
  *value = std::move(ids);
  return true;
}

bool JsonFields::ReadStrings(const char* name, std::vector<std::string>* value) {
  const json* field = Find(name);
  if (field == nullptr) return false;
  std::vector<std::string> strings;
  if (field->is_string()) strings.push_back(*field->get_ptr<const std::string*>());
  if (!field->is_string() && !field->is_array()) return Fail(name, "must be a string or an array of strings");
  for (size_t i = 0; field->is_array() && i < field->size(); ++i) {
    if (!(*field)[i].is_string()) return Fail(name, "must be a string or an array of strings");
    strings.push_back(*(*field)[i].get_ptr<const std::string*>());
  }
  *value = std::move(strings);
  return true;
}

bool AppendTokenIds(const json& array, std::vector<int32_t>* ids) {
  if (!array.is_array()) return false;
  ids->reserve(ids->size() + array.size());
  for (const json& item : array) {
    const std::optional<int64_t> integer = AsInteger(item);
    if (!integer.has_value() || *integer != static_cast<int32_t>(*integer)) return false;
    ids->push_back(static_cast<int32_t>(*integer));
  }
  return true;
}

}  // namespace cachalot
