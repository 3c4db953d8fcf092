// The JSON of answers, where sockets add nothing.
#include "server/http/answer_writer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "server/http/openai_error.h"
#include "server/text/json_text.h"

namespace cachalot {
namespace {

using nlohmann::json;

// The data of the events in a stream's bytes.
std::vector<json> Events(const std::string& bytes) {
  std::vector<json> events;
  for (size_t at = 0, end; (end = bytes.find("\n\n", at)) != std::string::npos; at = end + 2) {
    EXPECT_EQ(bytes.substr(at, 6), "data: ");
    const std::string data = bytes.substr(at + 6, end - at - 6);
    events.push_back(data == "[DONE]" ? json(data) : json::parse(data, nullptr, /*allow_exceptions=*/false));
    EXPECT_FALSE(events.back().is_discarded()) << data;
  }
  return events;
}

std::vector<json> EventsOf(const AnswerView& view, const GenerateEvent& event,
                           const std::vector<int32_t>* prompt = nullptr) {
  std::string bytes;
  AnswerWriter(view, "id", 7, "m").AppendEvents(2, event, prompt, {.prompt_tokens = 3, .completion_tokens = 4}, &bytes);
  return Events(bytes);
}

TEST(JsonTextTest, EverythingComesBack) {
  std::string text;
  for (int byte = 0; byte < 0x80; ++byte) text.push_back(static_cast<char>(byte));
  text += "é鯨🐳…\u00A0";
  std::string out = "x";
  AppendJsonString(text, &out);
  EXPECT_EQ(json::parse(out.substr(1)), json(text));
  EXPECT_NE(out.find("鯨🐳"), std::string::npos);  // not escaped
  EXPECT_NE(out.find("…\u00A0"), std::string::npos);
  out.clear();
  AppendJsonString("", &out);
  EXPECT_EQ(out, "\"\"");
}

// Readers of server-sent events may cut lines at these, as Python's str.splitlines does.
TEST(JsonTextTest, NothingEndsALine) {
  const std::string text =
      "a\xC2\x85"
      "b\u2028c\u2029\u2028";
  const std::string escaped = R"("a\u0085b\u2028c\u2029\u2028")";
  std::string out;
  AppendJsonString(text, &out);
  EXPECT_EQ(out, escaped);
  EXPECT_EQ(json::parse(out), json(text));
  EXPECT_EQ(Dump(text), escaped);
  GenerateEvent event;
  event.text = text;
  event.scores.push_back({.token = 1, .bytes = text, .logprob = -1.0f, .top = {{text, -2.0f}}});
  std::string bytes;
  AnswerWriter({.kind = AnswerKind::kChat, .stream = true, .logprobs = true}, text, 7, text)
      .AppendEvents(0, event, nullptr, {}, &bytes);
  for (const char* line_end : {"\xC2\x85", "\u2028", "\u2029"}) EXPECT_EQ(bytes.find(line_end), std::string::npos);
  EXPECT_EQ(Events(bytes).at(0)["choices"][0]["delta"]["content"], text);
}

TEST(AnswerWriterTest, LogprobsAreFinite) {
  GenerateEvent event;
  event.scores.push_back(
      {.token = 1, .bytes = "a", .logprob = -std::numeric_limits<float>::infinity(), .top = {{"b", std::nanf("")}}});
  const auto events = EventsOf({.stream = true, .logprobs = true}, event);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["choices"][0]["logprobs"], json::parse(R"({"tokens":["a"],"token_logprobs":[-9999.0],
      "top_logprobs":[{"b":-9999.0,"a":-9999.0}],"text_offset":[0]})"));
}

TEST(AnswerWriterTest, BytesThatAreNoCharacters) {
  GenerateEvent event;
  event.text = "x";
  event.scores.push_back({.token = 1, .bytes = "\xE2\x96", .logprob = -1.0f, .top = {}});
  const auto completion = EventsOf({.stream = true, .logprobs = true}, event);
  EXPECT_EQ(completion[0]["choices"][0]["logprobs"]["tokens"][0], "bytes:\\xe2\\x96");
  const auto chat = EventsOf({.kind = AnswerKind::kChat, .stream = true, .logprobs = true}, event);
  EXPECT_EQ(chat[0]["choices"][0]["logprobs"], json::parse(R"({"content":[{"token":"\\xe2\\x96","logprob":-1.0,
      "bytes":[226,150],"top_logprobs":[]}],"refusal":null})"));
}

TEST(AnswerWriterTest, ChunksOfACompletion) {
  GenerateEvent event;
  event.text = "a \"b\"\n";
  event.tokens = {5, 6};
  auto events = EventsOf({.stream = true}, event);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0], json::parse(R"({"id":"id","object":"text_completion","created":7,"model":"m",
      "choices":[{"index":2,"text":"a \"b\"\n","logprobs":null,"finish_reason":null}]})"));
  event.finish_reason = FinishReason::kStop;
  const std::vector<int32_t> prompt = {8};
  events = EventsOf({.stream = true, .token_ids = true, .include_usage = true}, event, &prompt);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["usage"], nullptr);
  EXPECT_TRUE(events[0].contains("usage"));
  EXPECT_EQ(events[0]["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(events[0]["choices"][0]["token_ids"], json({5, 6}));
  EXPECT_EQ(events[0]["choices"][0]["prompt_token_ids"], json({8}));
}

TEST(AnswerWriterTest, ChunksOfAChat) {
  GenerateEvent event;
  event.reasoning = "hm";
  event.text = "yes";
  event.tokens = {5, 6};
  event.finish_reason = FinishReason::kLength;
  const std::vector<int32_t> prompt = {8};
  const auto events = EventsOf({.kind = AnswerKind::kChat, .stream = true, .continuous_usage = true}, event, &prompt);
  ASSERT_EQ(events.size(), 4u);
  for (const json& chunk : events) {
    EXPECT_EQ(chunk["id"], "id");
    EXPECT_EQ(chunk["object"], "chat.completion.chunk");
    EXPECT_EQ(chunk["choices"][0]["index"], 2);
    EXPECT_EQ(
        chunk["usage"],
        json::parse(
            R"({"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":0},
      "prompt_cache_hit_tokens":0,"prompt_cache_miss_tokens":3})"));
  }
  EXPECT_EQ(events[0]["choices"][0]["delta"], json::parse(R"({"role":"assistant","content":""})"));
  EXPECT_EQ(events[1]["choices"][0]["delta"], json::parse(R"({"reasoning_content":"hm"})"));
  EXPECT_EQ(events[2]["choices"][0]["delta"], json::parse(R"({"content":"yes"})"));
  EXPECT_EQ(events[2]["choices"][0]["finish_reason"], nullptr);
  EXPECT_EQ(events[3]["choices"][0]["delta"], json::object());
  EXPECT_EQ(events[3]["choices"][0]["finish_reason"], "length");
}

// Of a token whose text is held back, clients that asked for log-probabilities or ids still hear at once, and only
// once.
TEST(AnswerWriterTest, DetailsWithoutText) {
  GenerateEvent event;
  event.tokens = {5};
  event.scores.push_back({.token = 5, .bytes = "a", .logprob = -1.0f, .top = {}});
  AnswerView view = {.kind = AnswerKind::kChat, .stream = true, .logprobs = true, .token_ids = true};
  EXPECT_TRUE(AnswerWriter(view, "id", 7, "m").IsVisible(event));
  const auto events = EventsOf(view, event);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["choices"][0]["delta"], json::parse(R"({"content":""})"));
  EXPECT_EQ(events[0]["choices"][0]["token_ids"], json({5}));
  EXPECT_EQ(events[0]["choices"][0]["logprobs"]["content"].size(), 1u);
  EXPECT_FALSE(AnswerWriter({.stream = true}, "id", 7, "m").IsVisible(event));
}

TEST(AnswerWriterTest, TheEndOfAStream) {
  std::string bytes;
  AnswerWriter({.stream = true, .include_usage = true}, "id", 7, "m").AppendDone({3, 4}, &bytes);
  const auto events = Events(bytes);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0]["choices"], json::array());
  EXPECT_EQ(events[0]["usage"]["total_tokens"], 7);
  EXPECT_EQ(events[1], "[DONE]");
}

TEST(AnswerWriterTest, WholeAnswers) {
  std::vector<AnswerChoice> choices(2);
  choices[0].answer.text = "yes";
  choices[0].answer.reasoning = "hm";
  choices[0].answer.finish_reason = FinishReason::kStop;
  choices[1].answer.text = "no";
  choices[1].answer.finish_reason = FinishReason::kLength;
  EXPECT_EQ(json::parse(AnswerWriter({.kind = AnswerKind::kChat}, "id", 7, "m").Whole(choices, {3, 4})),
            json::parse(R"({"id":"id","object":"chat.completion","created":7,"model":"m","choices":[
      {"index":0,"message":{"role":"assistant","content":"yes","reasoning_content":"hm","refusal":null},
       "logprobs":null,"finish_reason":"stop"},
      {"index":1,"message":{"role":"assistant","content":"no","refusal":null},
       "logprobs":null,"finish_reason":"length"}],
      "usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":0},
      "prompt_cache_hit_tokens":0,"prompt_cache_miss_tokens":3}})"));
  EXPECT_EQ(json::parse(AnswerWriter({}, "id", 7, "m").Whole(choices, {3, 4}))["choices"][1],
            json::parse(R"({"index":1,"text":"no","logprobs":null,"finish_reason":"length"})"));
}

// Events that waited for a slow client are one event afterwards, and nothing is lost.
TEST(AnswerWriterTest, EventsJoin) {
  GenerateEvent first, second;
  first.text = "a";
  first.reasoning = "r";
  first.tokens = {1};
  first.scores.push_back({.token = 1, .bytes = "a", .logprob = -1.0f, .top = {}});
  second.text = "b";
  second.tokens = {2, 3};
  second.finish_reason = FinishReason::kStop;
  second.stop_string = "END";
  second.usage = {3, 4};
  AppendEvent(second, &first);
  EXPECT_EQ(first.text, "ab");
  EXPECT_EQ(first.reasoning, "r");
  EXPECT_EQ(first.tokens, (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(first.scores.size(), 1u);
  EXPECT_EQ(first.finish_reason, FinishReason::kStop);
  EXPECT_EQ(first.stop_string, "END");
  EXPECT_EQ(first.usage.completion_tokens, 4);
}

TEST(AnswerWriterTest, ReasoningThatWasNoneIsTakenBack) {
  GenerateEvent first, last;
  first.reasoning = "a";
  last.text = "ab";
  last.takes_back_reasoning = true;
  AppendEvent(last, &first);
  EXPECT_EQ(first.text, "ab");
  EXPECT_EQ(first.reasoning, "");
}

}  // namespace
}  // namespace cachalot
