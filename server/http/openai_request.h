// Requests of OpenAI's completions API: JSON to calls.
#ifndef CACHALOT_SERVER_HTTP_OPENAI_REQUEST_H_
#define CACHALOT_SERVER_HTTP_OPENAI_REQUEST_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "server/text/generate.h"

namespace cachalot {

// POST /v1/completions: several prompts, `n` answers to each. Answer c of prompt p is choice p * n + c.
struct CompletionRequest {
  std::string model;  // empty: the one that is served
  std::vector<Prompt> prompts;
  GenerateCall call;  // what the prompts have in common; its own prompt is empty
  int n = 1;
  bool stream = false;
  bool include_usage = false;  // stream: usage in a chunk of its own at the end
  bool return_token_ids = false;
};

// POST /tokenize and /detokenize.
struct TokenizeRequest {
  std::string model;
  std::string prompt;
  bool add_special_tokens = true;
};
struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};

// InvalidArgument naming the field for a body that is not JSON, lacks a field, has one of the wrong type, or asks for
// something that we would otherwise silently not do. Ranges of sampling parameters are the generator's to check.
// Unknown fields are accepted.
absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body);
absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body);
absl::StatusOr<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_OPENAI_REQUEST_H_
