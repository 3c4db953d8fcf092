// Bodies of the HTTP API: whatever comes, a call or an error that names what is wrong and is itself valid JSON.
#include <nlohmann/json.hpp>

#include "server/http/openai_error.h"
#include "server/http/openai_request.h"
#include "tests/fuzz/fuzz.h"

namespace {

void CheckError(const absl::Status& status) {
  if (status.ok()) return;
  FUZZ_CHECK(status.code() == absl::StatusCode::kInvalidArgument);
  const std::string text = cachalot::Dump(cachalot::ErrorJson(status));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  FUZZ_CHECK(json.is_object() && json["error"].size() == 4 && json["error"]["message"].is_string());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  CheckError(cachalot::ParseCompletionRequest(body).status());
  CheckError(cachalot::ParseChatRequest(body).status());
  CheckError(cachalot::ParseTokenizeRequest(body).status());
  CheckError(cachalot::ParseDetokenizeRequest(body).status());
  return 0;
}
