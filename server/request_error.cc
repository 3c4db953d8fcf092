// Field and code travel as payloads of absl::Status.
#include "server/request_error.h"

#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "engine/engine.h"

namespace cachalot {
namespace {

constexpr char kCodeUrl[] = "cachalot/request-code";

std::string Payload(const absl::Status& status, const char* url) {
  const auto value = status.GetPayload(url);
  return value.has_value() ? std::string(*value) : "";
}

}  // namespace

absl::Status FieldError(std::string_view field, std::string_view message, std::string_view code) {
  return WithField(absl::InvalidArgumentError(absl::string_view(message.data(), message.size())), field, code);
}

absl::Status WithField(absl::Status status, std::string_view field, std::string_view code) {
  if (!field.empty()) status.SetPayload(kFieldUrl, absl::Cord(absl::string_view(field.data(), field.size())));
  if (!code.empty()) status.SetPayload(kCodeUrl, absl::Cord(absl::string_view(code.data(), code.size())));
  return status;
}

absl::Status CheckModelName(const std::string& asked, const std::string& served) {
  if (asked.empty() || asked == served) return absl::OkStatus();
  return WithField(
      absl::NotFoundError(absl::StrCat("The model '", asked, "' does not exist; this server has '", served, "'")),
      "model", "model_not_found");
}

std::string ErrorField(const absl::Status& status) { return Payload(status, kFieldUrl); }

std::string ErrorCode(const absl::Status& status) { return Payload(status, kCodeUrl); }

}  // namespace cachalot
