// Message by message: role, content as a string or as parts of text (a line each), tool calls.
#include "server/http/chat_messages.h"

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

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
    if (to->role == Role::kAssistant) ReadAnswer(from, to);
    if (const auto prefix = from.find("prefix"); prefix != from.end() && !prefix->is_null()) {
      if (!prefix->is_boolean()) return Fail(".prefix", "must be a boolean");
      to->prefix = prefix->get<bool>();
    }
    if (!to->content.has_value() && to->tool_calls.empty()) Fail(".content", "is missing");
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
    if (content == from.end() || content->is_null()) {
      const std::string* role = FindString(from, "role");
      if (role != nullptr && *role == "function") to->content = "";  // where null is legal, as it is an assistant's
      return;
    }
    if (content->is_string()) {
      to->content = *content->get_ptr<const std::string*>();
      return;
    }
    if (!content->is_array()) return Fail(".content", "must be a string or an array of text parts");
    std::vector<std::string_view> texts;
    for (const json& part : *content) {
      const std::string* text = PartText(part, to->role);
      if (text == nullptr) return Fail(".content", "may only hold parts of type text: this model takes nothing else");
      texts.push_back(*text);
    }
    to->content = absl::StrJoin(texts, "\n", [](std::string* out, std::string_view text) { out->append(text); });
  }

  // The text of a part of a message; of an answer's, what it refused with. nullptr if it is anything else.
  static const std::string* PartText(const json& part, Role role) {
    const std::string* type = FindString(part, "type");
    if (type == nullptr) return nullptr;
    if (*type == "text") return FindString(part, "text");
    return *type == "refusal" && role == Role::kAssistant ? FindString(part, "refusal") : nullptr;
  }

  // What only an assistant says. One that said nothing, not even by a tool call, is an empty answer: clients send back
  // what they got, in which content may be null beside "tool_calls": [] or a refusal.
  void ReadAnswer(const json& from, ChatMessage* to) {
    ReadToolCalls(from, to);
    if (const auto call = from.find("function_call"); call != from.end() && !call->is_null()) {
      ReadFunction(*call, ".function_call", &to->tool_calls.emplace_back());
    }
    if (to->content.has_value() || !to->tool_calls.empty()) return;
    const std::string* refusal = FindString(from, "refusal");
    to->content = refusal == nullptr ? "" : *refusal;
  }

  void ReadToolCalls(const json& from, ChatMessage* to) {
    const auto calls = from.find("tool_calls");
    if (calls == from.end() || calls->is_null()) return;
    if (!calls->is_array()) return Fail(".tool_calls", "must be an array");
    for (const json& call : *calls) {
      const auto function = call.is_object() ? call.find("function") : call.end();
      if (!call.is_object() || function == call.end()) return Fail(".tool_calls", "must hold objects with a function");
      ToolCall* tool_call = &to->tool_calls.emplace_back();
      if (const std::string* type = FindString(call, "type"); type != nullptr) tool_call->type = *type;
      ReadFunction(*function, ".tool_calls", tool_call);
    }
  }

  void ReadFunction(const json& from, std::string_view where, ToolCall* to) {
    const std::string* name = FindString(from, "name");
    if (name == nullptr) return Fail(where, "has a function without a name");
    to->name = *name;
    const auto arguments = from.find("arguments");
    if (arguments == from.end() || arguments->is_null()) return;
    if (!arguments->is_string()) return Fail(where, "has arguments that are not a string of JSON");
    to->arguments = *arguments->get_ptr<const std::string*>();
  }

  // A member that is a string; nullptr if it is not, or `object` is none.
  static const std::string* FindString(const json& object, const char* name) {
    const auto found = object.is_object() ? object.find(name) : object.end();
    return found == object.end() ? nullptr : found->get_ptr<const std::string*>();
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
