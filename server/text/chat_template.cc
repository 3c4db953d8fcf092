// The five templates as one renderer and a table of what differs between them; recognising their Jinja sources.
#include "server/text/chat_template.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/request_error.h"
#include "server/text/tokenizer_files.h"

namespace cachalot {
namespace {

constexpr std::string_view kUser = "<｜User｜>", kAssistant = "<｜Assistant｜>",
                           kEndOfSentence = "<｜end▁of▁sentence｜>";
constexpr std::string_view kCallsBegin = "<｜tool▁calls▁begin｜>", kCallsEnd = "<｜tool▁calls▁end｜>";
constexpr std::string_view kCallBegin = "<｜tool▁call▁begin｜>", kCallEnd = "<｜tool▁call▁end｜>",
                           kSep = "<｜tool▁sep｜>";
constexpr std::string_view kOutputsBegin = "<｜tool▁outputs▁begin｜>", kOutputsEnd = "<｜tool▁outputs▁end｜>";
constexpr std::string_view kOutputBegin = "<｜tool▁output▁begin｜>", kOutputEnd = "<｜tool▁output▁end｜>";

using Role = ChatMessage::Role;

// Where "<｜Assistant｜>" goes, besides the generation prompt.
enum class Marker : uint8_t {
  kBeforeAnswer,      // before each answer, and before the conversation's first tool call
  kAfterUser,         // at the end of what a user says
  kBetweenUserAndUs,  // before what directly follows a user, with a mark of thinking
};

// In which earlier answers thinking, up to a "</think>", is left out.
enum class Strip : uint8_t {
  kNone,
  kPlainAnswers,  // without tool calls and not right after a tool's output
  kAllAnswers,
};

// FNV-1a.
uint64_t HashOf(std::string_view text) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  return hash;
}

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Jinja source without the white space that means nothing: around it, and within tags outside of strings. In strings
// "\n" is written as the character.
std::string Normalized(std::string_view jinja) {
  std::string out;
  char quote = 0;
  bool in_tag = false;
  for (size_t i = 0; i < jinja.size(); ++i) {
    const char c = jinja[i], next = i + 1 < jinja.size() ? jinja[i + 1] : '\0';
    if (quote != 0) {
      const bool is_escape = c == '\\' && next != '\0';
      if (is_escape) ++i;
      out += is_escape && next == 'n' ? "\n" : is_escape ? std::string({c, next}) : std::string(1, c);
      if (c == quote) quote = 0;
    } else if (!in_tag) {
      in_tag = c == '{' && (next == '{' || next == '%');
      out += c;
    } else if (!IsSpace(c)) {
      if (c == '\'' || c == '"') quote = c;
      if (c == '}' && (absl::EndsWith(out, "}") || absl::EndsWith(out, "%"))) in_tag = false;
      out += c;
    }
  }
  const auto begin = std::find_if_not(out.begin(), out.end(), IsSpace);
  const auto end = std::find_if_not(out.rbegin(), std::make_reverse_iterator(begin), IsSpace).base();
  return std::string(begin, end);
}

}  // namespace

// How a template differs from the others.
struct ChatTemplate::Format {
  std::string_view name;
  size_t source_size;    // of the normalised Jinja source
  uint64_t source_hash;  // and its HashOf
  Marker marker;
  Strip strip = Strip::kNone;
  bool strips_to_last = true;     // up to the last "</think>", else the first
  bool restarts_lists = false;    // each message's tool calls are a list of their own; else one list a conversation
  bool closes_outputs = false;    // the list of outputs is closed before further tool calls
  bool has_content_calls = true;  // content may come with tool calls; else they are left out beside any content
  bool is_bare = false;           // calls are name and arguments; outputs are no list
  std::string_view call_separator = "\n", output_separator = "\n";
  std::string_view generation = "";  // what follows the generation prompt's "<｜Assistant｜>"
  bool may_think = false;            // answers may hold reasoning
};

const ChatTemplate::Format ChatTemplate::kFormats[] = {
    {.name = "v3",
     .source_size = 2062,
     .source_hash = 0xE8161F074169155C,
     .marker = Marker::kBeforeAnswer,
     .has_content_calls = false},
    {.name = "v3_0324",
     .source_size = 2720,
     .source_hash = 0x39EFFE36C1C88A7A,
     .marker = Marker::kAfterUser,
     .restarts_lists = true,
     .closes_outputs = true},
    {.name = "r1",
     .source_size = 2458,
     .source_hash = 0xC91A21D00B0B463B,
     .marker = Marker::kBeforeAnswer,
     .strip = Strip::kPlainAnswers,
     .output_separator = "",
     .generation = "<think>\n",
     .may_think = true},
    {.name = "r1_0528",
     .source_size = 2776,
     .source_hash = 0x5B97C14A134A3BC8,
     .marker = Marker::kAfterUser,
     .strip = Strip::kAllAnswers,
     .restarts_lists = true,
     .closes_outputs = true,
     .may_think = true},
    {.name = "v3_1",
     .source_size = 2612,
     .source_hash = 0xF880B6BAB03F982C,
     .marker = Marker::kBetweenUserAndUs,
     .strip = Strip::kPlainAnswers,
     .strips_to_last = false,
     .restarts_lists = true,
     .is_bare = true,
     .call_separator = "",
     .output_separator = "",
     .may_think = true},
};

// --- Rendering ---

// Text, and which of it is trusted.
class ChatTemplate::Writer {
 public:
  // What the template says.
  void Own(std::string_view text) {
    if (text.empty()) return;
    const size_t begin = chat_.text.size();
    chat_.text.append(text);
    if (!chat_.trusted.empty() && chat_.trusted.back().end == begin) {
      chat_.trusted.back().end = chat_.text.size();
    } else {
      chat_.trusted.push_back({begin, chat_.text.size()});
    }
  }
  template <typename... Texts>
  void Own(std::string_view first, Texts... rest) {
    Own(first);
    Own(rest...);
  }
  // What a message says.
  void Said(std::string_view text) { chat_.text.append(text); }

  size_t size() const { return chat_.text.size(); }
  std::string_view since(size_t begin) const { return std::string_view(chat_.text).substr(begin); }
  RenderedChat Take(ReasoningStart reasoning) {
    chat_.reasoning = reasoning;
    return std::move(chat_);
  }

 private:
  RenderedChat chat_;
};

// One rendering. The state is that of the templates: their namespace `ns`.
class ChatTemplate::Renderer {
 public:
  Renderer(const Format& format, const ChatPrompt& chat) : format_(format), chat_(chat) {}

  RenderedChat Run(std::string_view bos_token) {
    out_.Own(bos_token);
    System();
    for (const ChatMessage& message : chat_.messages) {
      last_begin_ = out_.size();
      const bool stays_open = chat_.continue_final_message && &message == &chat_.messages.back();
      switch (message.role) {
        case Role::kSystem: break;
        case Role::kUser: User(message); break;
        case Role::kTool: Output(message); break;
        case Role::kAssistant: Assistant(message, stays_open); break;
      }
    }
    const ReasoningStart reasoning = chat_.continue_final_message ? OpenMessageReasoning() : End();
    return out_.Take(reasoning);
  }

 private:
  // All system messages, wherever they stand.
  void System() {
    bool is_first = true;
    for (const ChatMessage& message : chat_.messages) {
      if (message.role != Role::kSystem) continue;
      if (!std::exchange(is_first, false)) out_.Own("\n\n");
      out_.Said(*message.content);
    }
  }

  void User(const ChatMessage& message) {
    after_output_ = false;
    after_user_ = true;
    out_.Own(kUser);
    out_.Said(*message.content);
    if (format_.marker == Marker::kAfterUser) out_.Own(kAssistant);
  }

  void Output(const ChatMessage& message) {
    after_output_ = true;
    after_user_ = false;
    const bool is_further = std::exchange(has_output_, true);
    if (!format_.is_bare && !is_further) out_.Own(kOutputsBegin);
    out_.Own(is_further ? format_.output_separator : "", kOutputBegin);
    out_.Said(*message.content);
    out_.Own(kOutputEnd);
  }

  void Assistant(const ChatMessage& message, bool stays_open) {
    const bool has_calls = !message.tool_calls.empty();
    const bool writes_calls = format_.has_content_calls ? has_calls : !message.content.has_value();
    if (writes_calls) {
      Calls(message);
    } else {
      Answer(message, stays_open);
    }
    after_output_ = false;
    after_user_ = false;
  }

  void Calls(const ChatMessage& message) {
    if (after_output_ && format_.closes_outputs) out_.Own(kOutputsEnd);
    if (after_user_ && format_.marker == Marker::kBetweenUserAndUs) out_.Own(kAssistant, kThinkClose);
    if (format_.restarts_lists) has_call_ = has_output_ = false;
    for (const ToolCall& call : message.tool_calls) {
      const bool is_further = std::exchange(has_call_, true);
      if (is_further) {
        out_.Own(format_.call_separator);
      } else {
        if (format_.marker == Marker::kBeforeAnswer) out_.Own(kAssistant);
        out_.Said(WithoutThinking(message, /*is_plain=*/false));
        out_.Own(kCallsBegin);
      }
      Call(call);
      // NOTE: v3 ends the list after every call but the first, and never when there is only one.
      if (is_further && !format_.has_content_calls) out_.Own(kCallsEnd, kEndOfSentence);
    }
    if (format_.has_content_calls) out_.Own(kCallsEnd, kEndOfSentence);
  }

  void Call(const ToolCall& call) {
    out_.Own(kCallBegin);
    out_.Said(format_.is_bare ? call.name : call.type);
    out_.Own(kSep);
    if (!format_.is_bare) {
      out_.Said(call.name);
      out_.Own("\n```json\n");
    }
    out_.Said(call.arguments);
    out_.Own(format_.is_bare ? "" : "\n```", kCallEnd);
  }

  void Answer(const ChatMessage& message, bool stays_open) {
    if (format_.marker == Marker::kBetweenUserAndUs) {
      if (after_user_) out_.Own(kAssistant, message.prefix && chat_.thinking ? kThinkOpen : kThinkClose);
    } else if (after_output_) {
      out_.Own(kOutputsEnd);
    } else if (format_.marker == Marker::kBeforeAnswer) {
      out_.Own(kAssistant);
    }
    out_.Said(WithoutThinking(message, /*is_plain=*/!after_output_));
    if (!stays_open) out_.Own(kEndOfSentence);
  }

  std::string_view WithoutThinking(const ChatMessage& message, bool is_plain) const {
    if (!message.content.has_value()) return {};
    const std::string_view content = *message.content;
    if (format_.strip == Strip::kNone || (format_.strip == Strip::kPlainAnswers && !is_plain)) return content;
    const size_t at = format_.strips_to_last ? content.rfind(kThinkClose) : content.find(kThinkClose);
    return at == std::string_view::npos ? content : content.substr(at + kThinkClose.size());
  }

  // What follows the last message.
  ReasoningStart End() {
    const bool is_bare_open = format_.marker == Marker::kBetweenUserAndUs;
    const bool has_marker = format_.marker == Marker::kAfterUser && after_user_;
    if (after_output_ && !format_.is_bare) out_.Own(kOutputsEnd);
    const ReasoningStart otherwise = MayThink() ? ReasoningStart::kMayOpen : ReasoningStart::kNever;
    if (!chat_.add_generation_prompt || after_output_ || has_marker || (is_bare_open && !after_user_)) return otherwise;
    const std::string_view generation = !is_bare_open ? format_.generation : chat_.thinking ? kThinkOpen : kThinkClose;
    out_.Own(kAssistant, generation);
    return generation.starts_with(kThinkOpen) ? ReasoningStart::kOpen : otherwise;
  }

  bool MayThink() const { return format_.may_think && (format_.marker != Marker::kBetweenUserAndUs || chat_.thinking); }

  // How the answer goes on that the last message begins.
  ReasoningStart OpenMessageReasoning() const {
    if (!MayThink()) return ReasoningStart::kNever;
    const std::string_view begun = out_.since(last_begin_);
    const size_t open = begun.rfind(kThinkOpen), close = begun.rfind(kThinkClose);
    if (open != std::string_view::npos && (close == std::string_view::npos || close < open)) {
      return ReasoningStart::kOpen;
    }
    const std::string& content = *chat_.messages.back().content;
    const bool is_blank = close == std::string_view::npos && std::all_of(content.begin(), content.end(), IsSpace);
    return is_blank ? ReasoningStart::kMayOpen : ReasoningStart::kNever;
  }

  const Format& format_;
  const ChatPrompt& chat_;
  Writer out_;
  size_t last_begin_ = 0;                           // of the last message, in the text
  bool has_call_ = false, has_output_ = false;      // in the list being written
  bool after_user_ = false, after_output_ = false;  // what was written last
};

absl::StatusOr<RenderedChat> ChatTemplate::Render(const ChatPrompt& chat, std::string_view bos_token) const {
  if (chat.messages.empty()) return FieldError("messages", "messages must hold at least one message");
  for (size_t i = 0; i < chat.messages.size(); ++i) {
    const ChatMessage& message = chat.messages[i];
    if (message.content.has_value()) continue;
    const bool is_assistant = message.role == Role::kAssistant;
    if (is_assistant && (!message.tool_calls.empty() || !format_->has_content_calls)) continue;
    return FieldError("messages", absl::StrCat("messages[", i, "] must have content",
                                               is_assistant ? " or tool_calls" : ", which is not null"));
  }
  if (chat.continue_final_message) {
    const ChatMessage& last = chat.messages.back();
    if (chat.add_generation_prompt) {
      return FieldError("continue_final_message",
                        "continue_final_message and add_generation_prompt exclude each other");
    }
    if (last.role != Role::kAssistant || !last.content.has_value() || !last.tool_calls.empty()) {
      return FieldError("continue_final_message",
                        "continue_final_message needs a last message of the assistant's, with content and without "
                        "tool_calls");
    }
  }
  return Renderer(*format_, chat).Run(bos_token);
}

// --- Names and sources ---

std::optional<ChatTemplate> ChatTemplate::ParseName(std::string_view name) {
  for (const Format& format : kFormats) {
    if (format.name == name) return ChatTemplate(&format);
  }
  return std::nullopt;
}

std::string ChatTemplate::Names() {
  return absl::StrJoin(kFormats, ", ", [](std::string* out, const Format& format) { out->append(format.name); });
}

std::string_view ChatTemplate::Name() const { return format_->name; }

std::optional<ChatTemplate::Detected> ChatTemplate::Detect(std::string_view jinja) {
  const std::string source = Normalized(jinja);
  const uint64_t hash = HashOf(source);
  for (const Format& format : kFormats) {
    if (format.source_size == source.size() && format.source_hash == hash) return Detected{ChatTemplate(&format), true};
  }
  const auto has = [jinja](std::string_view text) { return jinja.find(text) != std::string_view::npos; };
  if (!has(kUser) || !has(kAssistant)) return std::nullopt;
  const char* name = nullptr;
  if (has("thinking")) {
    name = "v3_1";
  } else if (has(kThinkClose)) {
    name = has("is_last_user") ? "r1_0528" : "r1";
  } else if (has("is_last_user")) {
    name = "v3_0324";
  } else if (has(kCallsBegin)) {
    name = "v3";
  }
  if (name == nullptr) return std::nullopt;
  return Detected{*ParseName(name), false};
}

absl::StatusOr<ChatTemplate::Detected> ChatTemplate::Load(const std::string& model_dir) {
  const absl::StatusOr<ChatTemplateSource> source = ReadChatTemplateSource(model_dir);
  if (!source.ok()) return source.status();
  if (const std::optional<Detected> detected = Detect(source->jinja); detected.has_value()) return *detected;
  return absl::UnimplementedError(absl::StrCat(source->path, ": the chat template is none of ", Names()));
}

}  // namespace cachalot
