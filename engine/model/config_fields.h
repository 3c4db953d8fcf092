// ConfigFields: typed, checked reading of a checkpoint's configuration files.
#ifndef CACHALOT_ENGINE_MODEL_CONFIG_FIELDS_H_
#define CACHALOT_ENGINE_MODEL_CONFIG_FIELDS_H_

#include <cmath>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json_file.h"

namespace cachalot {

inline std::string PathIn(const std::string& model_dir, const char* file) {
  return absl::StrCat(model_dir, absl::EndsWith(model_dir, "/") ? "" : "/", file);
}

inline absl::StatusOr<std::string> ReadConfigText(const std::string& path) {
  constexpr int64_t kMaxConfigBytes = 4 << 20;
  return ReadFile(path, kMaxConfigBytes);
}

// The object that a configuration file must be.
inline absl::StatusOr<nlohmann::json> ParseConfigObject(const std::string& text, const std::string& file_name) {
  absl::StatusOr<nlohmann::json> root = ParseJson(text, file_name, {.max_depth = 16, .max_values = 100'000});
  if (!root.ok() || root->is_object()) return root;
  return absl::InvalidArgumentError(absl::StrCat(file_name, ": found ", root->type_name(), ", expected an object"));
}

// The fields of one JSON object. Keeps the first problem; after it, every getter returns a harmless value.
class ConfigFields {
 public:
  // `object` may be null: an object without fields.
  ConfigFields(const nlohmann::json* object, std::string where, absl::Status* status)
      : object_(object), where_(std::move(where)), status_(status) {}

  const nlohmann::json* Get(const char* name) const {
    if (object_ == nullptr) return nullptr;
    auto it = object_->find(name);
    return it == object_->end() ? nullptr : &*it;
  }
  bool Has(const char* name) const { return Get(name) != nullptr && !Get(name)->is_null(); }
  bool IsNull(const char* name) const { return Get(name) != nullptr && Get(name)->is_null(); }

  int Int(const char* name, int min, int max) const {
    const double value = Number(name);
    if (value != std::floor(value) || value < min || value > max) {
      Refuse(name, absl::StrCat("an integer from ", min, " to ", max));
      return min;
    }
    return static_cast<int>(value);
  }
  int IntOr(const char* name, int absent, int min, int max) const { return Has(name) ? Int(name, min, max) : absent; }

  double Double(const char* name, double min, double max) const {
    const double value = Number(name);
    if (!(value >= min && value <= max)) {
      Refuse(name, absl::StrCat("a number from ", min, " to ", max));
      return min;
    }
    return value;
  }
  double DoubleOr(const char* name, double absent, double min, double max) const {
    return Has(name) ? Double(name, min, max) : absent;
  }

  bool Bool(const char* name) const {
    const nlohmann::json* value = Get(name);
    if (value == nullptr || !value->is_boolean()) {
      Refuse(name, "true or false");
      return false;
    }
    return *value->get_ptr<const nlohmann::json::boolean_t*>();
  }
  bool BoolOr(const char* name, bool absent) const { return Has(name) ? Bool(name) : absent; }

  std::string String(const char* name) const {
    const nlohmann::json* value = Get(name);
    if (value == nullptr || !value->is_string()) {
      Refuse(name, "a string");
      return "";
    }
    return *value->get_ptr<const nlohmann::json::string_t*>();
  }
  std::string StringOr(const char* name, const char* absent) const { return Has(name) ? String(name) : absent; }

  // The array of integers, or the one integer, or nothing.
  std::vector<int> Ints(const char* name, int min, int max) const {
    std::vector<int> values;
    if (!Has(name)) return values;
    if (!Get(name)->is_array()) return {Int(name, min, max)};
    for (const nlohmann::json& element : *Get(name)) {
      const nlohmann::json wrapped = {{name, element}};
      values.push_back(ConfigFields(&wrapped, where_, status_).Int(name, min, max));
    }
    return values;
  }

  // `field` as an object of its own.
  ConfigFields Object(const char* name) const {
    const nlohmann::json* value = Get(name);
    const bool is_object = value != nullptr && value->is_object();
    if (!is_object) Refuse(name, "an object");
    return ConfigFields(is_object ? value : nullptr, absl::StrCat(where_, name, "."), status_);
  }

  // Records that the field is not what it should be, or what it may be but nothing here computes.
  void Refuse(const char* name, const std::string& expected) const {
    Record(absl::InvalidArgumentError(Message(name, expected)));
  }
  void RefuseUnimplemented(const char* name, const std::string& expected) const {
    Record(absl::UnimplementedError(Message(name, expected)));
  }

 private:
  double Number(const char* name) const {
    const nlohmann::json* value = Get(name);
    if (value == nullptr || !value->is_number()) return std::numeric_limits<double>::quiet_NaN();
    if (value->is_number_float()) return *value->get_ptr<const double*>();
    if (value->is_number_unsigned()) return static_cast<double>(*value->get_ptr<const uint64_t*>());
    return static_cast<double>(*value->get_ptr<const int64_t*>());
  }
  std::string Message(const char* name, const std::string& expected) const {
    const nlohmann::json* value = Get(name);
    const std::string found =
        value == nullptr ? "nothing" : value->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
    return absl::StrCat(where_, name, ": found ", found.substr(0, 200), ", expected ", expected);
  }
  void Record(absl::Status status) const {
    if (status_->ok()) *status_ = std::move(status);
  }

  const nlohmann::json* object_;
  std::string where_;  // "config.json: " or "config.json: rope_scaling."
  absl::Status* status_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_CONFIG_FIELDS_H_
