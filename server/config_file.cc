// NOTE: CLI11 has a reader of its own, which takes for TOML much that is not.
#include "server/config_file.h"

#define TOML_EXCEPTIONS 0
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace cachalot {
namespace {

std::optional<std::string> ToText(const toml::node& node) {
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* number = node.as_integer()) return absl::StrCat(number->get());
  if (const auto* flag = node.as_boolean()) return flag->get() ? "true" : "false";
  if (const auto* number = node.as_floating_point(); number != nullptr && std::isfinite(number->get())) {
    return absl::StrFormat("%.17g", number->get());
  }
  return std::nullopt;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ReadConfigFile(const std::string& path) {
  const toml::parse_result file = toml::parse_file(path);
  if (!file) {
    const toml::parse_error& error = file.error();
    const auto at = error.source().begin;
    const std::string place = at ? absl::StrCat(":", at.line, ":", at.column) : "";
    const absl::string_view what(error.description().data(), error.description().size());
    return absl::InvalidArgumentError(absl::StrCat(path, place, ": ", what));
  }
  std::vector<std::string> arguments;
  for (const auto& [key, node] : file.table()) {
    const std::optional<std::string> text = ToText(node);
    const std::string name(key.str());
    if (!text.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", node.source().begin.line, ": ", name, " must be a text, a number or a truth value"));
    }
    arguments.push_back(absl::StrCat("--", name, "=", *text));
  }
  return arguments;
}

}  // namespace cachalot
