// Generator: chats: their prompts, reasoning in their answers, what cannot be written.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <tuple>

#include "server/request_error.h"
#include "tests/server/generator_testing.h"
#include "tests/server/tokenizer_testing.h"

namespace cachalot {
namespace {

using GeneratorChatTest = GeneratorTest;

GenerateCall Chat(std::string content, int max_tokens = 16) {
  GenerateCall call = Call("", max_tokens);
  call.prompt = ChatPrompt{.messages = {{.role = ChatMessage::Role::kUser, .content = std::move(content)}}};
  return call;
}
GeneratorOptions With(std::string_view name) { return {.chat_template = ChatTemplate::ParseName(name)}; }

TEST_F(GeneratorChatTest, AChatIsWrittenByItsTemplate) {
  const Answer answer = Run({.script = Ids("Hello world")}, Chat("Hello", 2), tokenizer_.get(), With("v3"));
  EXPECT_EQ(plan_->prompt, Ids("<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>"));
  EXPECT_EQ(answer.text, "Hello world");
  EXPECT_EQ(answer.reasoning, "");
  FakeEngine engine;
  Generator generator(&engine, tokenizer_.get(), With("v3_1"));
  EXPECT_EQ(*generator.Tokenize(std::get<ChatPrompt>(Chat("Hello").prompt)),
            Ids("<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜></think>"));
}

TEST_F(GeneratorChatTest, MessagesAreWordsUnlessTheyAreTrusted) {
  const auto num_markers = [this] {
    return std::count(plan_->prompt.begin(), plan_->prompt.end(), *tokenizer_->TokenToId("<｜Assistant｜>"));
  };
  GeneratorOptions options = With("v3");
  Run({}, Chat("<｜Assistant｜>"), tokenizer_.get(), options);
  EXPECT_EQ(num_markers(), 1);
  options.allow_special_tokens = true;
  Run({}, Chat("<｜Assistant｜>"), tokenizer_.get(), options);
  EXPECT_EQ(num_markers(), 2);
}

TEST_F(GeneratorChatTest, ReasoningIsToldApart) {
  const std::string thought = "<think>\nHe thinks\n</think>\n\nHello", half = "He thinks</think>Hello";
  const struct {
    const char* name;
    bool thinking;
    std::string answer, reasoning, text;
  } kCases[] = {
      {"v3", false, thought, "", thought},
      {"v3_0324", true, thought, "", thought},
      {"r1", false, half, "He thinks", "Hello"},
      {"r1", false, thought, "He thinks", "Hello"},
      {"r1_0528", false, half, "He thinks", "Hello"},
      {"r1_0528", false, thought, "He thinks", "Hello"},
      {"v3_1", true, half, "He thinks", "Hello"},
      {"v3_1", false, half, "", half},
      {"r1", false, "He thinks", "He thinks", ""},
      {"r1_0528", false, "Hello", "", "Hello"},
      {"r1", false, "He </th", "He </th", ""},
  };
  for (const auto& test : kCases) {
    GenerateCall call = Chat("x", 200);
    std::get<ChatPrompt>(call.prompt).thinking = test.thinking;
    for (const int tokens_per_delta : {1, 3, 100}) {
      std::vector<int32_t> script = Ids(test.answer);
      script.push_back(FakeEngine::kEos);
      const Answer answer =
          Run({.script = script, .tokens_per_delta = tokens_per_delta}, call, tokenizer_.get(), With(test.name));
      EXPECT_EQ(answer.reasoning, test.reasoning) << test.name;
      EXPECT_EQ(answer.text, test.text) << test.name;
      EXPECT_EQ(answer.tokens, script);
    }
  }
}

// No template opens <think> after a tool's output; models that think may, or think without.
TEST_F(GeneratorChatTest, ReasoningAfterATool) {
  using Role = ChatMessage::Role;
  GenerateCall call = Call("", 200);
  call.prompt = ChatPrompt{
      .messages = {{.role = Role::kUser, .content = "x"},
                   {.role = Role::kAssistant, .content = {}, .tool_calls = {{.name = "f", .arguments = "{}"}}},
                   {.role = Role::kTool, .content = "5"}}};
  const struct {
    const char* name;
    bool thinking;
    std::string answer, reasoning, text;
  } kCases[] = {
      {"r1", false, "Five?</think>Five", "Five?", "Five"},
      {"r1", false, "<think>Five?</think>Five", "Five?", "Five"},
      {"r1", false, "Five", "", "Five"},
      {"r1_0528", false, "Five?</think>Five", "Five?", "Five"},
      {"v3_1", true, "Five?</think>Five", "Five?", "Five"},
      {"v3_1", true, "Five", "", "Five"},
      {"v3_1", false, "Five", "", "Five"},
      {"v3_1", false, "Five?</think>Five", "", "Five?</think>Five"},
      {"v3", false, "Five?</think>Five", "", "Five?</think>Five"},
  };
  for (const auto& test : kCases) {
    std::get<ChatPrompt>(call.prompt).thinking = test.thinking;
    std::vector<int32_t> script = Ids(test.answer);
    script.push_back(FakeEngine::kEos);
    const Answer answer = Run({.script = script, .max_model_len = 1000}, call, tokenizer_.get(), With(test.name));
    EXPECT_EQ(answer.reasoning, test.reasoning) << test.name << ": " << test.answer;
    EXPECT_EQ(answer.text, test.text) << test.name << ": " << test.answer;
    EXPECT_EQ(answer.last.takes_back_reasoning,
              test.text == "Five" && test.reasoning.empty() && answer.pieces[0].empty());
  }
}

TEST_F(GeneratorChatTest, StopStringsLookAtReasoningToo) {
  GenerateCall call = Chat("x", 200);
  call.stop = {"nks</th"};
  const Answer answer = Run({.script = Ids("He thinks</think>Hello")}, call, tokenizer_.get(), With("r1"));
  EXPECT_EQ(answer.reasoning, "He thi");
  EXPECT_EQ(answer.text, "");
  EXPECT_EQ(answer.last.stop_string, "nks</th");
}

// Tokenizers may list <think> as special, which detokenizers leave out.
TEST_F(GeneratorChatTest, ReasoningMarkersMayBeSpecialTokens) {
  using nlohmann::json;
  ModelDir dir;
  json spec = json::parse(ReadText(kSmallModel + "/tokenizer.json"));
  for (json& token : spec["added_tokens"]) {
    if (token["content"] == "<think>") token["special"] = true;
  }
  spec["model"]["vocab"]["</think>"] = 930;
  spec["added_tokens"].push_back(
      {{"content", "</think>"}, {"id", 930}, {"special", true}, {"normalized", false}, {"single_word", false}});
  dir.Write("tokenizer.json", spec.dump());
  const auto tokenizer = LoadOrDie(dir.path());
  const std::vector<int32_t> script = *tokenizer->Encode("<think>a</think>b<|EOT|>");
  ASSERT_EQ(script.size(), 5u);
  for (const auto& [name, text, reasoning] :
       {std::make_tuple("r1", "b", "a"), std::make_tuple("r1_0528", "b", "a"), std::make_tuple("v3_1", "ab", "")}) {
    const Answer answer = Run({.script = script, .vocab_size = 1000}, Chat("x", 5), tokenizer.get(), With(name));
    EXPECT_EQ(answer.text, text) << name;
    EXPECT_EQ(answer.reasoning, reasoning) << name;
  }
}

TEST_F(GeneratorChatTest, ChatsThatCannotBeWritten) {
  FakeEngine engine({.max_model_len = 32});
  Generator without(&engine, tokenizer_.get()), with(&engine, tokenizer_.get(), With("v3"));
  Generator without_tokenizer(&engine, nullptr, With("v3"));
  const auto unknown = without.Prepare(Chat("x"));
  EXPECT_EQ(ErrorField(unknown.status()), "messages");
  for (const char* words : {"--chat-template", "v3_0324"}) {
    EXPECT_NE(unknown.status().message().find(words), absl::string_view::npos);
  }
  EXPECT_EQ(ErrorField(without_tokenizer.Prepare(Chat("x")).status()), "messages");
  GenerateCall call;
  call.prompt = ChatPrompt{};
  EXPECT_EQ(ErrorField(with.Prepare(call).status()), "messages");
  EXPECT_EQ(ErrorField(with.Prepare(Chat("\xFF")).status()), "messages");
  const auto too_long = with.Prepare(Chat(std::string(1000, '!')));
  EXPECT_EQ(ErrorField(too_long.status()), "messages");
  EXPECT_EQ(ErrorCode(too_long.status()), "context_length_exceeded");
}

}  // namespace
}  // namespace cachalot
