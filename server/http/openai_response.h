// Answers of OpenAI's completions API: events to JSON.
#ifndef CACHALOT_SERVER_HTTP_OPENAI_RESPONSE_H_
#define CACHALOT_SERVER_HTTP_OPENAI_RESPONSE_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "server/text/generate.h"

namespace cachalot {

// What every JSON of one completion repeats.
struct CompletionHeader {
  std::string id;
  int64_t created = 0;  // seconds since 1970
  std::string model;
};

// One choice, or what a chunk of a stream adds to it.
struct CompletionPart {
  int index = 0;
  std::string text;
  std::vector<TokenScore> scores;
  std::vector<int32_t> tokens;
  FinishReason finish_reason = FinishReason::kNone;
  const std::vector<int32_t>* prompt = nullptr;  // the prompt's token ids, to be shown
};

// What the client asked to see.
struct CompletionView {
  bool logprobs = false;
  bool token_ids = false;
};

nlohmann::ordered_json PartJson(const CompletionPart& part, CompletionView view);
nlohmann::ordered_json UsageJson(const Usage& usage);

// {"id", "object": "text_completion", "created", "model", "choices"}; usage is the caller's to add.
nlohmann::ordered_json CompletionJson(const CompletionHeader& header, nlohmann::ordered_json choices);

// A token in log-probabilities: its text, or "bytes:\xe2\x96" when it is not well-formed UTF-8.
std::string TokenLabel(const std::string& bytes);

// "data: {json}\n\n".
std::string SseEvent(std::string_view data);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_OPENAI_RESPONSE_H_
