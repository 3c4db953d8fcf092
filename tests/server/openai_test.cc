// OpenAI's API over real sockets and a fake engine: answers, streams, failures, and what is beside the API.
#include "server/http/openai.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "tests/server/openai_testing.h"

namespace cachalot {
namespace {

using nlohmann::json;

// The data of each event of a stream; fails if the bytes are anything but "data: ...\n\n" over and over.
std::vector<std::string> Events(const std::string& body) {
  std::vector<std::string> events;
  for (absl::string_view event : absl::StrSplit(body, "\n\n")) {
    if (event.empty()) continue;
    EXPECT_EQ(event.substr(0, 6), "data: ");
    EXPECT_EQ(event.find('\n'), absl::string_view::npos);
    events.emplace_back(event.substr(6));
  }
  EXPECT_TRUE(absl::string_view(body).substr(body.size() - 2) == "\n\n");
  return events;
}

json UsageJson(int64_t prompt_tokens, int64_t completion_tokens, int64_t cached_tokens = 0) {
  return {{"prompt_tokens", prompt_tokens},
          {"completion_tokens", completion_tokens},
          {"total_tokens", prompt_tokens + completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", cached_tokens}}},
          {"prompt_cache_hit_tokens", cached_tokens},
          {"prompt_cache_miss_tokens", prompt_tokens - cached_tokens}};
}

class OpenAiTest : public OpenAiServerTest {
 protected:
  std::vector<std::string> Stream(json body) {
    body["stream"] = true;
    const ClientResponse response = client_->Post("/v1/completions", body.dump());
    EXPECT_EQ(response.status, 200) << response.body;
    EXPECT_EQ(response.headers.at("content-type"), "text/event-stream; charset=utf-8");
    return Events(response.body);
  }
};

TEST_F(OpenAiTest, Completion) {
  Start({.script = Ids("Hello world")});
  const json answer = Complete({{"model", "org/model"}, {"prompt", "He"}, {"max_tokens", 2}});
  EXPECT_EQ(answer["object"], "text_completion");
  EXPECT_EQ(answer["id"].get<std::string>().substr(0, 5), "cmpl-");
  EXPECT_EQ(answer["model"], "org/model");
  EXPECT_TRUE(answer["created"].is_number_integer());
  const json expected = {{"index", 0}, {"text", "Hello world"}, {"logprobs", nullptr}, {"finish_reason", "length"}};
  EXPECT_EQ(answer["choices"], json::array({expected}));
  EXPECT_EQ(answer["usage"], UsageJson(2, 2));
}

// Of several answers the one that computed most of the prompt tells what was cached; of prompts, the sum counts.
TEST_F(OpenAiTest, CachedTokensAndTheSalt) {
  Start({.script = {50}, .cached_tokens = 2});
  EXPECT_EQ(Complete({{"prompt", {5, 6, 7}}, {"max_tokens", 2}})["usage"], UsageJson(3, 2, 2));
  EXPECT_EQ(engine_->requests()[0].cache_salt, "");
  const json several = {{"prompt", {{5, 6, 7}, {8, 9, 8, 9}}}, {"max_tokens", 1}, {"n", 2}, {"cache_salt", "tenant"}};
  EXPECT_EQ(Complete(several)["usage"], UsageJson(7, 4, 4));  // choice 1 of each: one token more
  EXPECT_EQ(engine_->requests()[4].cache_salt, "tenant");
  const auto events = Stream({{"prompt", {5, 6, 7}},
                              {"max_tokens", 2},
                              {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}});
  EXPECT_EQ(Parse(events[0])["usage"], UsageJson(3, 1, 2));
  EXPECT_EQ(Parse(events[2])["usage"], UsageJson(3, 2, 2));
  EXPECT_EQ(engine_->num_resets(), 0);
  EXPECT_EQ(client_->Post("/reset_prefix_cache", "").status, 200);
  EXPECT_EQ(engine_->num_resets(), 1);
  EXPECT_EQ(client_->Post("/v1/completions", R"({"prompt":"x","cache_salt":5})").status, 400);
}

TEST_F(OpenAiTest, PromptsInAllShapesAndSeveralAnswers) {
  Start({.script = {50}, .add_choice = true});
  const auto prompts_of = [this](const json& prompt) {
    const size_t before = engine_->requests().size();
    Complete({{"prompt", prompt}, {"max_tokens", 1}});
    std::vector<std::vector<int32_t>> prompts;
    for (size_t i = before; i < engine_->requests().size(); ++i) prompts.push_back(engine_->requests()[i].prompt);
    return prompts;
  };
  using Prompts = std::vector<std::vector<int32_t>>;
  const int32_t hello = Ids("Hello")[0];
  EXPECT_EQ(prompts_of("Hello"), (Prompts{{0, hello}}));
  EXPECT_EQ(prompts_of({"Hello", ""}), (Prompts{{0, hello}, {0}}));
  EXPECT_EQ(prompts_of({3, 4}), (Prompts{{3, 4}}));
  EXPECT_EQ(prompts_of({{3, 4}, {5}}), (Prompts{{3, 4}, {5}}));

  const json answer =
      Complete({{"prompt", {{3, 4}, {5}}}, {"n", 3}, {"max_tokens", 1}, {"seed", 1}, {"return_token_ids", true}});
  ASSERT_EQ(answer["choices"].size(), 6u);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(answer["choices"][i]["index"], i);
    EXPECT_EQ(answer["choices"][i]["token_ids"], json::array({50 + i % 3}));
    EXPECT_EQ(answer["choices"][i]["prompt_token_ids"], i < 3 ? json({3, 4}) : json::array({5}));
  }
  EXPECT_EQ(answer["usage"]["prompt_tokens"], 3);  // once a prompt
  EXPECT_EQ(answer["usage"]["completion_tokens"], 6);
}

TEST_F(OpenAiTest, LogprobsInOpenAisForm) {
  const int32_t first = *tokenizer_->TokenToId("\xC3"), second = *tokenizer_->TokenToId("\xA9");
  Start({.script = {first, second}});
  const json answer = Complete({{"prompt", "He"}, {"max_tokens", 2}, {"echo", true}, {"logprobs", 1}});
  const json& choice = answer["choices"][0];
  EXPECT_EQ(choice["text"], "Heé");
  const json& logprobs = choice["logprobs"];
  const int32_t he = Ids("He")[0];
  EXPECT_EQ(logprobs["tokens"], json({"<｜begin▁of▁sentence｜>", "He", "bytes:\\xc3", "bytes:\\xa9"}));
  EXPECT_EQ(logprobs["token_logprobs"],
            json({nullptr, FakeEngine::LogprobOf(he), FakeEngine::LogprobOf(first), FakeEngine::LogprobOf(second)}));
  EXPECT_EQ(logprobs["text_offset"], json({0, 0, 2, 2}));
  ASSERT_EQ(logprobs["top_logprobs"].size(), 4u);
  EXPECT_TRUE(logprobs["top_logprobs"][0].is_null());
  const auto [token, logprob] = FakeEngine::Alternative(he, 0);
  EXPECT_EQ(logprobs["top_logprobs"][1],
            json({{tokenizer_->TokenBytes(token), logprob}, {"He", FakeEngine::LogprobOf(he)}}));
}

TEST_F(OpenAiTest, EchoScoresAPromptWithoutGenerating) {
  Start();
  const json answer = Complete({{"prompt", "Hello world"}, {"max_tokens", 0}, {"echo", true}, {"logprobs", 0}});
  EXPECT_EQ(answer["choices"][0]["text"], "Hello world");
  EXPECT_EQ(answer["choices"][0]["logprobs"]["tokens"].size(), 3u);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 0);
}

TEST_F(OpenAiTest, StopStringsEndTheAnswer) {
  Start({.script = Ids("Hello world"), .step = absl::Milliseconds(1)});
  for (const json& stop : {json("lo w"), json({"zzz", "lo w"})}) {
    const json answer = Complete({{"prompt", "x"}, {"max_tokens", 200}, {"stop", stop}});
    EXPECT_EQ(answer["choices"][0]["text"], "Hel");
    EXPECT_EQ(answer["choices"][0]["finish_reason"], "stop");
  }
  EXPECT_TRUE(engine_->AwaitCancels(2));
}

TEST_F(OpenAiTest, Streams) {
  Start({.script = Ids("Hello world")});
  const auto events = Stream({{"prompt", "x"}, {"max_tokens", 4}, {"return_token_ids", true}});
  ASSERT_EQ(events.size(), 5u);
  EXPECT_EQ(events.back(), "[DONE]");
  std::string text;
  for (size_t i = 0; i < 4; ++i) {
    const json chunk = Parse(events[i]);
    EXPECT_EQ(chunk["object"], "text_completion");
    EXPECT_EQ(chunk["id"], Parse(events[0])["id"]);
    EXPECT_FALSE(chunk.contains("usage"));
    const json& choice = chunk["choices"][0];
    text += choice["text"].get<std::string>();
    EXPECT_EQ(choice["finish_reason"], i == 3 ? json("length") : json(nullptr));
    EXPECT_EQ(choice["token_ids"].size(), 1u);
    EXPECT_EQ(choice.contains("prompt_token_ids"), i == 0);
  }
  EXPECT_EQ(text, "Hello worldHello world");
}

TEST_F(OpenAiTest, StreamsUsageWhenAsked) {
  Start({.script = Ids("Hello world")});
  const auto events =
      Stream({{"prompt", "x"}, {"max_tokens", 2}, {"n", 2}, {"stream_options", {{"include_usage", true}}}});
  ASSERT_EQ(events.size(), 6u);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(Parse(events[i])["usage"].is_null() && Parse(events[i]).contains("usage"));
  const json last = Parse(events[4]);
  EXPECT_EQ(last["choices"], json::array());
  EXPECT_EQ(last["usage"], UsageJson(2, 4));
  EXPECT_EQ(events[5], "[DONE]");
}

TEST_F(OpenAiTest, ContinuousUsageIsThatOfAChoice) {
  Start({.script = Ids("Hello world")});
  const auto events = Stream({{"prompt", {{3, 4}, {5}}},
                              {"max_tokens", 2},
                              {"n", 2},
                              {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}});
  ASSERT_EQ(events.size(), 10u);
  int num_events[4] = {};
  for (int i = 0; i < 8; ++i) {
    const json chunk = Parse(events[i]);
    const int index = chunk["choices"][0]["index"], prompt = index < 2 ? 2 : 1, answer = ++num_events[index];
    EXPECT_EQ(chunk["usage"], UsageJson(prompt, answer));
  }
  EXPECT_EQ(Parse(events[8])["usage"], UsageJson(3, 8));
}

TEST_F(OpenAiTest, AStreamEqualsTheWholeAnswer) {
  Start({.script = Ids("the cat é中 sat on 123 worlds"), .tokens_per_delta = 3});
  const json body = {{"prompt", "Hello"}, {"max_tokens", 40}, {"echo", true},
                     {"logprobs", 2},     {"seed", 1},        {"return_token_ids", true}};
  const json whole = Complete(body)["choices"][0];
  std::string text;
  json logprobs, token_ids = json::array();
  for (const std::string& event : Stream(body)) {
    if (event == "[DONE]") break;
    const json choice = Parse(event)["choices"][0];
    text += choice["text"].get<std::string>();
    token_ids.insert(token_ids.end(), choice["token_ids"].begin(), choice["token_ids"].end());
    for (const auto& [key, values] : choice["logprobs"].items()) {
      for (const json& value : values) logprobs[key].push_back(value);
    }
  }
  EXPECT_EQ(text, whole["text"]);
  EXPECT_EQ(token_ids, whole["token_ids"]);
  EXPECT_EQ(logprobs, whole["logprobs"]);
}

TEST_F(OpenAiTest, AFailureBeforeOrWithinAStream) {
  Start({.fail_after = 2});
  const auto events = Stream({{"prompt", "x"}, {"max_tokens", 5}, {"return_token_ids", true}});
  ASSERT_EQ(events.size(), 3u);
  const json error = Parse(events[2])["error"];
  EXPECT_EQ(error["message"], "the fake engine fails");
  EXPECT_EQ(error["type"], "server_error");
  const ClientResponse response = client_->Post("/v1/completions", R"({"prompt": "x", "max_tokens": 5})");
  EXPECT_EQ(response.status, 500);
  EXPECT_EQ(Parse(response.body)["error"]["message"], "the fake engine fails");
}

TEST_F(OpenAiTest, AFullQueueAsksToComeBack) {
  Start({.step = absl::Milliseconds(20), .max_requests = 2});
  // The third of three prompts is refused: the other two are cancelled.
  const ClientResponse response = client_->Post("/v1/completions", R"({"prompt": ["a", "b", "c"], "max_tokens": 200})");
  EXPECT_EQ(response.status, 429);
  EXPECT_EQ(response.headers.at("retry-after"), "1");
  EXPECT_EQ(Parse(response.body)["error"]["code"], "rate_limit_exceeded");
  EXPECT_TRUE(engine_->AwaitCancels(2));
  EXPECT_TRUE(engine_->AwaitIdle());
  // The two that were taken have ended; the third was nothing that a histogram should know of.
  ClientResponse page;
  const std::string labels = "{model_name=\"org/model\",engine=\"0\"} ";
  const auto has = [&page, &labels](const char* name, int value) {
    return page.body.find(absl::StrCat("vllm:", name, labels, value, "\n")) != std::string::npos;
  };
  for (int i = 0; i < 10'000 && !has("request_generation_tokens_count", 2); ++i) page = client_->Get("/metrics");
  for (const char* name : {"request_prompt_tokens_count", "request_params_max_tokens_count",
                           "request_generation_tokens_count", "e2e_request_latency_seconds_count"}) {
    EXPECT_TRUE(has(name, 2)) << name << page.body;
  }
}

TEST_F(OpenAiTest, AClientThatLeavesCancelsItsRequests) {
  for (const bool stream : {false, true}) {
    Start({.step = absl::Milliseconds(5)});
    client_->SendPost("/v1/completions",
                      json({{"prompt", "x"}, {"n", 3}, {"max_tokens", 250}, {"stream", stream}}).dump());
    if (stream) {
      ASSERT_TRUE(client_->ReadUntil("data: "));
    }
    client_->Close();
    EXPECT_TRUE(engine_->AwaitCancels(3));
    EXPECT_TRUE(engine_->AwaitIdle());
    TearDown();
  }
}

TEST_F(OpenAiTest, StoppingEndsWhatIsInFlightWithAnError) {
  Start({.step = absl::Milliseconds(5)});
  RawHttpClient streaming(server_->port());
  client_->SendPost("/v1/completions", R"({"prompt": "x", "max_tokens": 250})");
  streaming.SendPost("/v1/completions", R"({"prompt": "x", "max_tokens": 250, "stream": true})");
  ASSERT_TRUE(streaming.ReadUntil("data: "));
  server_->StopAccepting();
  generator_->Stop();
  engine_ = nullptr;
  const ClientResponse response = client_->ReadResponse();
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(Parse(response.body)["error"]["code"], "service_unavailable");
  const std::vector<std::string> events = Events(streaming.ReadResponse().body);
  EXPECT_TRUE(Parse(events.back()).contains("error"));
}

TEST_F(OpenAiTest, WithoutATokenizer) {
  Start({}, /*with_tokenizer=*/false);
  const json answer = Complete({{"prompt", {5, 6}}, {"max_tokens", 2}});
  EXPECT_EQ(answer["choices"][0]["text"], "");
  EXPECT_EQ(answer["choices"][0]["token_ids"], json({10, 11}));
  for (const auto& [path, body, param] :
       std::vector<std::array<const char*, 3>>{{"/v1/completions", R"({"prompt": "x"})", "prompt"},
                                               {"/tokenize", R"({"prompt": "x"})", "prompt"},
                                               {"/detokenize", R"({"tokens": [1]})", "tokens"}}) {
    const ClientResponse response = client_->Post(path, body);
    EXPECT_EQ(response.status, 400);
    EXPECT_EQ(Parse(response.body)["error"]["param"], param);
  }
}

TEST_F(OpenAiTest, TokenizeAndDetokenize) {
  Start();
  const json tokens = Parse(client_->Post("/tokenize", R"({"model": "org/model", "prompt": "Hello world"})").body);
  std::vector<int32_t> expected = Ids("Hello world");
  EXPECT_EQ(
      Parse(client_->Post("/tokenize", R"({"prompt": "Hello world", "add_special_tokens": false})").body)["tokens"],
      json(expected));
  expected.insert(expected.begin(), 0);
  EXPECT_EQ(tokens, json({{"tokens", expected}, {"count", 3}, {"max_model_len", 256}}));
  const std::string body = json({{"tokens", Ids("Hello world")}}).dump();
  EXPECT_EQ(Parse(client_->Post("/detokenize", body).body), json({{"prompt", "Hello world"}}));
}

TEST_F(OpenAiTest, ModelsHealthAndVersion) {
  Start();
  const json models = Parse(RawHttpClient(server_->port()).Get("/v1/models").body);
  EXPECT_EQ(models["object"], "list");
  const json& model = models["data"][0];
  EXPECT_EQ(model["id"], "org/model");
  EXPECT_EQ(model["object"], "model");
  EXPECT_EQ(model["root"], "/models/model");
  EXPECT_EQ(model["max_model_len"], 256);
  EXPECT_EQ(Parse(RawHttpClient(server_->port()).Get("/v1/models/org/model").body), model);
  EXPECT_EQ(Parse(RawHttpClient(server_->port()).Get("/v1/models/org%2Fmodel").body), model);
  EXPECT_EQ(RawHttpClient(server_->port()).Get("/v1/models/other").status, 404);
  EXPECT_EQ(Parse(RawHttpClient(server_->port()).Get("/version").body)["version"], "1.2.3");
  for (const char* path : {"/livez", "/readyz", "/health"})
    EXPECT_EQ(RawHttpClient(server_->port()).Get(path).status, 200);
  engine_->set_health(absl::InternalError("the rank is dead"));
  EXPECT_EQ(RawHttpClient(server_->port()).Get("/livez").status, 200);
  for (const char* path : {"/readyz", "/health"}) {
    const ClientResponse response = RawHttpClient(server_->port()).Get(path);
    EXPECT_EQ(response.status, 503);
    EXPECT_EQ(Parse(response.body)["error"]["message"], "the rank is dead");
  }
}

TEST_F(OpenAiTest, ErrorsBelowTheApiHaveItsForm) {
  Start();
  for (const auto& [response, status] : {std::pair{client_->Get("/v2"), 404}, {client_->Get("/tokenize"), 405}}) {
    EXPECT_EQ(response.status, status);
    const json error = Parse(response.body)["error"];
    EXPECT_EQ(error["type"], "invalid_request_error");
    EXPECT_TRUE(error["param"].is_null() && error["code"].is_null());
  }
  for (const auto& [path, param] : {std::pair{"/tokenize", "prompt"}, {"/detokenize", "tokens"}}) {
    EXPECT_EQ(Parse(client_->Post(path, "{}").body)["error"]["param"], param);
    EXPECT_EQ(client_->Post(path, "{").status, 400);
    EXPECT_EQ(client_->Post(path, R"({"model": "other", "prompt": "x", "tokens": [1]})").status, 404);
  }
  EXPECT_EQ(client_->Post("/detokenize", R"({"tokens": [320]})").status, 400);
}

}  // namespace
}  // namespace cachalot
