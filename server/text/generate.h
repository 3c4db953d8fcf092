// What a protocol asks of the generator and what it gets back: calls in, events out.
#ifndef CACHALOT_SERVER_TEXT_GENERATE_H_
#define CACHALOT_SERVER_TEXT_GENERATE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "server/text/reasoning.h"

namespace cachalot {

// What the model said or was told in one turn of a conversation.
struct ToolCall {
  std::string type = "function", name, arguments;  // arguments: JSON as the model wrote it
};
struct ChatMessage {
  enum class Role : uint8_t { kSystem, kUser, kAssistant, kTool };
  Role role = Role::kUser;
  std::optional<std::string> content;     // none: null, which only an assistant's may be
  std::vector<ToolCall> tool_calls = {};  // an assistant's
  bool prefix = false;                    // an assistant's, last: the answer's beginning
};

// A conversation, to be written as the model's template writes it.
struct ChatPrompt {
  std::vector<ChatMessage> messages;
  bool add_generation_prompt = true;    // end with what makes the model answer
  bool continue_final_message = false;  // the last message is the answer's beginning and stays open
  bool thinking = false;                // for templates that know both ways (V3.1)
};

using Prompt = std::variant<std::string, std::vector<int32_t>, ChatPrompt>;

// One prompt and how to answer it, as a client sent it.
struct GenerateCall {
  Prompt prompt;
  bool add_special_tokens = true;   // text: begin with BOS when the checkpoint's tokenizer does
  bool match_special = true;        // text: added tokens written out in it ("<｜User｜>") become their ids
  SamplingParams sampling;          // `choice` and `prompt_logprobs` are set by the generator
  bool fill_context = false;        // the answer may fill the context: sampling.max_tokens is not looked at
  std::vector<std::string> stop;    // text that ends the answer and is not part of it; from min_tokens on
  bool include_stop = false;        // what ends the answer, a stop string or token, is part of it all the same
  bool skip_special_tokens = true;  // in text
  bool echo = false;                // the answer begins with the prompt; with log-probabilities, so do they
  int priority = 0;                 // Request::priority
  std::string client;               // Request::client
  std::string cache_salt;           // Request::cache_salt
  absl::Time deadline = absl::InfiniteFuture();  // past it the answer ends with kError (DeadlineExceeded)
};

// A checked call with its token ids. Immutable; the n answers of one prompt share it.
struct GeneratePlan {
  std::vector<int32_t> prompt;
  int num_added = 0;  // tokens at the front of the prompt that the text did not hold
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool include_stop = false, skip_special_tokens = true;
  bool echo = false;
  ReasoningStart reasoning = ReasoningStart::kNever;
  int priority = 0;
  std::string client, cache_salt;
  absl::Time deadline = absl::InfiniteFuture();
};

// A token with its log-probability. `bytes` are the token's own and need not be whole characters; "token_id:7" for an
// id without text.
struct TokenScore {
  int32_t token = 0;
  std::string bytes;
  std::optional<float> logprob;                    // none for the first token of a prompt
  std::vector<std::pair<std::string, float>> top;  // likeliest first; as asked for, the token itself not added
  int64_t text_offset = 0;                         // characters (code points) of the answer before this token
};

struct Usage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt: found in the prefix cache
};

// A step of one answer. The text of all events together is the answer; a token's text may come in a later event than
// the token, because what could begin a stop string or end the reasoning is held back. Where a model may think or not,
// its answer comes as reasoning until that is known (see ReasoningSplitter).
struct GenerateEvent {
  std::string text;                   // well-formed UTF-8
  std::string reasoning;              // what the model thought before its answer; of chats only, well-formed UTF-8
  bool takes_back_reasoning = false;  // the last event: all reasoning before was the answer, and is in `text` now
  std::vector<int32_t> tokens;        // generated; a stop token and the tokens of a stop string included
  std::vector<TokenScore> scores;     // when log-probabilities were asked for: prompt tokens first if echoed
  FinishReason finish_reason = FinishReason::kNone;  // set in the last event, exactly once
  std::string stop_string;                           // the one that ended the answer, if one did
  absl::Status error;                                // when kError; with the engine's code
  Usage usage;                                       // in the last event; `cached_tokens` in all
};

// Log-probabilities (of tokens and of alternatives, about a hundred bytes each) that may wait in the server, for a slow
// client or for the end of an answer that is no stream; more end the request.
inline constexpr size_t kMaxHeldScores = 512 << 10;

// Called in order, from the engine's output thread, until the event with a finish reason. Must not block and must not
// start generations; cancelling is allowed.
using EventSink = std::function<void(GenerateEvent)>;

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_GENERATE_H_
