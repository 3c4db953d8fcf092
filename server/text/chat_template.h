// Chat templates of DeepSeek-V3's family: a conversation to the text that the model was trained on.
#ifndef CACHALOT_SERVER_TEXT_CHAT_TEMPLATE_H_
#define CACHALOT_SERVER_TEXT_CHAT_TEMPLATE_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/text/generate.h"
#include "server/text/reasoning.h"
#include "server/text/tokenizer.h"

namespace cachalot {

// A conversation as text.
struct RenderedChat {
  std::string text;
  std::vector<TextRange> trusted;  // what the template itself wrote; the rest are the messages' words
  ReasoningStart reasoning = ReasoningStart::kNever;
};

// One of the five templates that were shipped (in Jinja, with the checkpoints), written out in code. A value; methods
// may be called from any thread.
class ChatTemplate {
 public:
  // By name: "v3", "v3_0324", "r1", "r1_0528", "v3_1".
  static std::optional<ChatTemplate> ParseName(std::string_view name);
  static std::string Names();  // all of them, for messages to people
  std::string_view Name() const;

  struct Detected;
  // The template that `jinja` is the source of. A known source is recognised exactly, but for white space around
  // Jinja's own words; another one by the markers it writes, if it is of this family; else none.
  static std::optional<Detected> Detect(std::string_view jinja);

  // Detects the template of a checkpoint: chat_template.jinja in `model_dir`, else "chat_template" in
  // tokenizer_config.json (a string, or the one named "default" of a list). NotFound when there is neither,
  // Unimplemented when it is none of ours, InvalidArgument when a file is malformed; messages name the file.
  static absl::StatusOr<Detected> Load(const std::string& model_dir);

  // Writes `chat`, letter by letter what the Jinja source writes with trim_blocks and lstrip_blocks, `tool_calls`
  // being undefined for messages that have none. Where the source fails we do, with InvalidArgument about "messages":
  // content that is null where the template writes it. One exception: r1_0528 fails on null content beside tool calls,
  // which clients send and for which it has a branch; we write that branch.
  // continue_final_message ends within the last message, which must be an assistant's with content and no tool calls,
  // before its end-of-sentence; with add_generation_prompt it is refused. InvalidArgument about "messages" when there
  // are none.
  absl::StatusOr<RenderedChat> Render(const ChatPrompt& chat, std::string_view bos_token) const;

  friend bool operator==(const ChatTemplate&, const ChatTemplate&) = default;

 private:
  struct Format;
  class Writer;
  class Renderer;
  static const Format kFormats[];

  explicit ChatTemplate(const Format* format) : format_(format) {}

  const Format* format_;  // of kFormats
};

struct ChatTemplate::Detected {
  ChatTemplate chat_template;
  bool is_exact;  // false: only its markers were recognised, and what we write may differ from what it writes
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_CHAT_TEMPLATE_H_
