// Message by message: role, content as a string or as parts of text, tool calls.
#include "server/http/chat_messages.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

using nlohmann::json;
using Role = ChatMessage::Role;

// One message; mistakes name their place in the request.
class MessageReader {
 public:
  MessageReader(JsonFields* fields, size_t index) : fields_(fields), place_(absl::StrCat("messages[", index, "]")) {}

  void Read(const json& from, ChatMessage* to) {
    if (!from.is_object()) return Fail("", "must be an object");
    ReadRole(from, to);
    ReadContent(from, to);
    if (to->role == Role::kAssistant) ReadToolCalls(from, to);
    if (const auto prefix = from.find("prefix"); prefix != from.end() && !prefix->is_null()) {
      if (!prefix->is_boolean()) return Fail(".prefix", "must be a boolean");
      to->prefix = prefix->get<bool>();
    }
    if (to->content.has_value() || (to->role == Role::kAssistant && !to->tool_calls.empty())) return;
    Fail(".content", "is missing");
  }

 private:
  void Fail(std::string_view where, std::string_view message) {
    fields_->Fail(absl::StrCat(place_, absl::string_view(where.data(), where.size())).c_str(), message);
  }

  void ReadRole(const json& from, ChatMessage* to) {
    constexpr std::pair<const char*, Role> kRoles[] = {{"system", Role::kSystem}, {"developer", Role::kSystem},
                                                       {"user", Role::kUser},     {"assistant", Role::kAssistant},
                                                       {"tool", Role::kTool},     {"function", Role::kTool}};
    const auto role = from.find("role");
    if (role == from.end() || !role->is_string()) return Fail(".role", "must be a string");
    for (const auto& [name, value] : kRoles) {
      if (*role != name) continue;
      to->role = value;
      return;
    }
    Fail(".role", "must be one of system, developer, user, assistant and tool");
  }

  void ReadContent(const json& from, ChatMessage* to) {
    const auto content = from.find("content");
    if (content == from.end() || content->is_null()) return;
    if (content->is_string()) {
      to->content = *content->get_ptr<const std::string*>();
      return;
    }
    if (!content->is_array()) return Fail(".content", "must be a string or an array of text parts");
    to->content = "";
    for (const json& part : *content) {
      const bool is_text =
          part.is_object() && part.value("type", json()) == "text" && part.contains("text") && part["text"].is_string();
      if (!is_text) return Fail(".content", "may only hold parts of type text: this model takes nothing else");
      *to->content += *part["text"].get_ptr<const std::string*>();
    }
  }

  void ReadToolCalls(const json& from, ChatMessage* to) {
    const auto calls = from.find("tool_calls");
    if (calls == from.end() || calls->is_null()) return;
    if (!calls->is_array()) return Fail(".tool_calls", "must be an array");
    for (const json& call : *calls) {
      const auto function = call.is_object() ? call.find("function") : call.end();
      if (!call.is_object() || function == call.end() || !function->is_object()) {
        return Fail(".tool_calls", "must hold objects with a function");
      }
      const auto name = function->find("name"), arguments = function->find("arguments");
      if (name == function->end() || !name->is_string()) return Fail(".tool_calls", "has a function without a name");
      ToolCall tool_call{.name = *name->get_ptr<const std::string*>(), .arguments = ""};
      if (const auto type = call.find("type"); type != call.end() && type->is_string()) {
        tool_call.type = *type->get_ptr<const std::string*>();
      }
      if (arguments != function->end() && !arguments->is_null()) {
        if (!arguments->is_string()) return Fail(".tool_calls", "has arguments that are not a string of JSON");
        tool_call.arguments = *arguments->get_ptr<const std::string*>();
      }
      to->tool_calls.push_back(std::move(tool_call));
    }
  }

  JsonFields* const fields_;
  const std::string place_;
};

}  // namespace

void ReadChatPrompt(JsonFields* fields, ChatPrompt* prompt) {
  const json* messages = fields->Find("messages");
  if (messages == nullptr || !messages->is_array() || messages->empty()) {
    fields->Fail("messages", "must be an array of at least one message");
    return;
  }
  prompt->messages.resize(messages->size());
  for (size_t i = 0; i < messages->size() && fields->status().ok(); ++i) {
    MessageReader(fields, i).Read((*messages)[i], &prompt->messages[i]);
  }
  fields->Read("continue_final_message", &prompt->continue_final_message);
  // NOTE: a message that stays open is what the model goes on with.
  prompt->add_generation_prompt = !prompt->continue_final_message;
  fields->Read("add_generation_prompt", &prompt->add_generation_prompt);
  if (const json* kwargs = fields->Find("chat_template_kwargs"); kwargs != nullptr) {
    if (!kwargs->is_object()) {
      fields->Fail("chat_template_kwargs", "must be an object");
      return;
    }
    JsonFields kwargs_fields(*kwargs, "chat_template_kwargs.");
    kwargs_fields.Read("thinking", &prompt->thinking);
    fields->Take(kwargs_fields.status());
  }
}

}  // namespace cachalot
