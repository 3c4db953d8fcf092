// Requests of OpenAI's completions and chat completions APIs: JSON to calls.
#ifndef CACHALOT_SERVER_HTTP_OPENAI_REQUEST_H_
#define CACHALOT_SERVER_HTTP_OPENAI_REQUEST_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "server/http/answer_writer.h"
#include "server/text/generate.h"

namespace cachalot {

// POST /v1/completions and /v1/chat/completions: prompts (one, of a chat), `n` answers to each. Answer c of prompt p is
// choice p * n + c.
struct CompletionRequest {
  std::string model;  // empty: the one that is served
  std::vector<Prompt> prompts;
  GenerateCall call;  // what the prompts have in common; its own prompt is empty
  int n = 1;
  AnswerView view;
};

// POST /tokenize: text, or a conversation.
struct TokenizeRequest {
  std::string model;
  Prompt prompt;
  bool add_special_tokens = true;
};
// POST /detokenize.
struct DetokenizeRequest {
  std::string model;
  std::vector<int32_t> tokens;
};

// InvalidArgument naming the field for a body that is not JSON, lacks a field, has one of the wrong type, or asks for
// something that we would otherwise silently not do. Ranges of sampling parameters are the generator's to check.
// Unknown fields are accepted. `defaults`: how a request is sampled as far as it says nothing itself.
absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body, const SamplingParams& defaults = {});
absl::StatusOr<CompletionRequest> ParseChatRequest(std::string_view body, const SamplingParams& defaults = {});
absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body);
absl::StatusOr<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_OPENAI_REQUEST_H_
