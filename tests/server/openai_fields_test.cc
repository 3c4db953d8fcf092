// The fields of OpenAI's requests: what reaches the engine, what asks for nothing, and the error of every wrong one.
#include <gtest/gtest.h>

#include <array>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "tests/server/openai_testing.h"
#include "tests/server/unusual_sampling.h"

namespace cachalot {
namespace {

using nlohmann::json;

using OpenAiFieldsTest = OpenAiServerTest;

TEST_F(OpenAiFieldsTest, DefaultsAreThoseOfOpenAi) {
  Start();
  Complete({{"prompt", "x"}, {"temperature", nullptr}, {"max_tokens", nullptr}, {"stop", nullptr}, {"made_up", 1}});
  const SamplingParams sampling = engine_->requests().at(0).sampling;
  EXPECT_EQ(sampling.max_tokens, 16);
  EXPECT_EQ(sampling.temperature, 1.0f);
  EXPECT_EQ(sampling.top_p, 1.0f);
  EXPECT_EQ(sampling.logprobs, -1);
  Complete({{"prompt", "x"}});
  EXPECT_NE(engine_->requests().at(1).sampling.seed, sampling.seed);  // random unless given
}

TEST_F(OpenAiFieldsTest, DefaultsMayBeTheCheckpoints) {
  Start({}, /*with_tokenizer=*/true, "v3", UnusualSampling());
  const auto sampling_of = [this](const char* path, const json& body) {
    EXPECT_EQ(client_->Post(path, body.dump()).status, 200);
    return engine_->requests().back().sampling;
  };
  const json messages = {{{"role", "user"}, {"content", "x"}}};
  for (const SamplingParams& silent : {sampling_of("/v1/completions", {{"prompt", "x"}, {"top_p", nullptr}}),
                                       sampling_of("/v1/chat/completions", {{"messages", messages}})}) {
    EXPECT_EQ(silent.temperature, 0.6f);
    EXPECT_EQ(silent.top_p, 0.95f);
    EXPECT_EQ(silent.top_k, 20);
    EXPECT_EQ(silent.min_p, 0.1f);
    EXPECT_EQ(silent.repetition_penalty, 1.2f);
  }
  const SamplingParams said = sampling_of(
      "/v1/completions",
      {{"prompt", "x"}, {"temperature", 1}, {"top_p", 1}, {"top_k", -1}, {"min_p", 0}, {"repetition_penalty", 1}});
  EXPECT_EQ(said.temperature, 1.0f);
  EXPECT_EQ(said.top_p, 1.0f);
  EXPECT_EQ(said.top_k, 0);
  EXPECT_EQ(said.min_p, 0.0f);
  EXPECT_EQ(said.repetition_penalty, 1.0f);
}

TEST_F(OpenAiFieldsTest, AllParametersReachTheEngine) {
  Start();
  Complete({{"prompt", "x"},
            {"temperature", 0.5},
            {"top_p", 0.9},
            {"top_k", 5},
            {"min_p", 0.1},
            {"presence_penalty", 0.2},
            {"frequency_penalty", 0.3},
            {"repetition_penalty", 1.1},
            {"seed", -7},
            {"max_tokens", 3},
            {"ignore_eos", true},
            {"stop_token_ids", {4, 5}},
            {"logprobs", 3},
            {"user", "me"}});
  const SamplingParams sampling = engine_->requests().at(0).sampling;
  EXPECT_EQ(sampling.temperature, 0.5f);
  EXPECT_EQ(sampling.top_p, 0.9f);
  EXPECT_EQ(sampling.top_k, 5);
  EXPECT_EQ(sampling.min_p, 0.1f);
  EXPECT_EQ(sampling.presence_penalty, 0.2f);
  EXPECT_EQ(sampling.frequency_penalty, 0.3f);
  EXPECT_EQ(sampling.repetition_penalty, 1.1f);
  EXPECT_EQ(sampling.seed, static_cast<uint64_t>(-7));
  EXPECT_EQ(sampling.max_tokens, 3);
  EXPECT_TRUE(sampling.ignore_eos);
  EXPECT_EQ(sampling.stop_token_ids, std::vector<int32_t>({4, 5}));
  EXPECT_EQ(sampling.logprobs, 3);
  EXPECT_EQ(sampling.prompt_logprobs, -1);
  Complete({{"prompt", "x"}, {"top_k", -1}});
  EXPECT_EQ(engine_->requests().at(1).sampling.top_k, 0);
}

struct WrongRequest {
  const char* body;
  int status;
  const char* param;  // nullptr: null
  const char* code;
};
constexpr WrongRequest kWrongRequests[] = {
    {"", 400, nullptr, nullptr},
    {"{", 400, nullptr, nullptr},
    {"nonsense", 400, nullptr, nullptr},
    {"[]", 400, nullptr, nullptr},
    {"null", 400, nullptr, nullptr},
    {R"({"prompt": "x"} trailing)", 400, nullptr, nullptr},
    {R"({"prompt": "\ud800"})", 400, nullptr, nullptr},
    {R"({"prompt": 1e999})", 400, nullptr, nullptr},
    {"{}", 400, "prompt", nullptr},
    {R"({"prompt": null})", 400, "prompt", nullptr},
    {R"({"prompt": 5})", 400, "prompt", nullptr},
    {R"({"prompt": {}})", 400, "prompt", nullptr},
    {R"({"prompt": []})", 400, "prompt", nullptr},
    {R"({"prompt": [[]]})", 400, "prompt", nullptr},
    {R"({"prompt": ["a", 1]})", 400, "prompt", nullptr},
    {R"({"prompt": [1, "a"]})", 400, "prompt", nullptr},
    {R"({"prompt": [1.5]})", 400, "prompt", nullptr},
    {R"({"prompt": [true]})", 400, "prompt", nullptr},
    {R"({"prompt": [[1], "a"]})", 400, "prompt", nullptr},
    {R"({"prompt": [-1]})", 400, "prompt", nullptr},
    {R"({"prompt": [320]})", 400, "prompt", nullptr},
    {R"({"prompt": [99999999999]})", 400, "prompt", nullptr},
    {R"({"prompt": "x", "model": "other"})", 404, "model", "model_not_found"},
    {R"({"prompt": "x", "model": 5})", 400, "model", nullptr},
    {R"({"prompt": "x", "max_tokens": -1})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": 0})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": 1.5})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": "5"})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": true})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": 1e300})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": 5e9})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "max_tokens": 18446744073709551615})", 400, "max_tokens", nullptr},
    {R"({"prompt": [1e10]})", 400, "prompt", nullptr},
    {R"({"prompt": "x", "max_tokens": 99999999999})", 400, "max_tokens", nullptr},
    {R"({"prompt": "x", "temperature": -1})", 400, "temperature", nullptr},
    {R"({"prompt": "x", "temperature": 1e39})", 400, "temperature", nullptr},
    {R"({"prompt": "x", "temperature": "hot"})", 400, "temperature", nullptr},
    {R"({"prompt": "x", "top_p": 0})", 400, "top_p", nullptr},
    {R"({"prompt": "x", "top_k": -2})", 400, "top_k", nullptr},
    {R"({"prompt": "x", "min_p": 2})", 400, "min_p", nullptr},
    {R"({"prompt": "x", "presence_penalty": 3})", 400, "presence_penalty", nullptr},
    {R"({"prompt": "x", "frequency_penalty": -3})", 400, "frequency_penalty", nullptr},
    {R"({"prompt": "x", "repetition_penalty": 0})", 400, "repetition_penalty", nullptr},
    {R"({"prompt": "x", "seed": 1.5})", 400, "seed", nullptr},
    {R"({"prompt": "x", "n": 0})", 400, "n", nullptr},
    {R"({"prompt": "x", "n": 129})", 400, "n", nullptr},
    {R"({"prompt": ["a", "b", "c", "d", "e", "f", "g", "h", "i"], "n": 128})", 400, "n", nullptr},
    {R"({"prompt": "x", "best_of": 2})", 400, "best_of", nullptr},
    {R"({"prompt": "x", "logprobs": 21})", 400, "logprobs", nullptr},
    {R"({"prompt": "x", "logprobs": true})", 400, "logprobs", nullptr},
    {R"({"prompt": "x", "echo": 1})", 400, "echo", nullptr},
    {R"({"prompt": "x", "stream": "yes"})", 400, "stream", nullptr},
    {R"({"prompt": "x", "stream_options": 1})", 400, "stream_options", nullptr},
    {R"({"prompt": "x", "stream_options": {"include_usage": 1}})", 400, "stream_options.include_usage", nullptr},
    {R"({"prompt": "x", "stop": 5})", 400, "stop", nullptr},
    {R"({"prompt": "x", "stop": ["a", 5]})", 400, "stop", nullptr},
    {R"({"prompt": "x", "stop": ""})", 400, "stop", nullptr},
    {R"({"prompt": "x", "stop_token_ids": [400]})", 400, "stop_token_ids", nullptr},
    {R"({"prompt": "x", "stop_token_ids": "a"})", 400, "stop_token_ids", nullptr},
    {R"({"prompt": "x", "ignore_eos": "a"})", 400, "ignore_eos", nullptr},
    {R"({"prompt": "x", "suffix": "y"})", 400, "suffix", nullptr},
    {R"({"prompt": "x", "response_format": {"type": "json_object"}})", 400, "response_format", nullptr},
};

TEST_F(OpenAiFieldsTest, WrongRequests) {
  Start({.max_model_len = 32});
  const auto json_or_null = [](const char* text) { return text == nullptr ? json(nullptr) : json(text); };
  const auto expect_error = [&](const std::string& body, const WrongRequest& expected) {
    const std::string shown = body.substr(0, 100);
    const ClientResponse response = client_->Post("/v1/completions", body);
    EXPECT_EQ(response.status, expected.status) << shown;
    const json error = Parse(response.body)["error"];
    EXPECT_EQ(error["param"], json_or_null(expected.param)) << shown << response.body;
    EXPECT_EQ(error["code"], json_or_null(expected.code)) << shown;
    EXPECT_EQ(error["type"], "invalid_request_error");
    EXPECT_TRUE(error["message"].is_string() && !error["message"].get<std::string>().empty());
    EXPECT_EQ(error.size(), 4u);
  };
  for (const WrongRequest& test : kWrongRequests) expect_error(test.body, test);
  const WrongRequest no_json = {"", 400, nullptr, nullptr};
  const std::string deep(10'000, '[');
  expect_error("{\"prompt\": \"\xFF\xFE\"}", no_json);
  expect_error(absl::StrCat("{\"prompt\": ", deep), no_json);
  expect_error(absl::StrCat("{\"prompt\": ", deep, std::string(10'000, ']'), "}"), no_json);
  expect_error(absl::StrCat("{\"prompt\": \"", std::string(100, 'z'), "\"}"),
               {"", 400, "prompt", "context_length_exceeded"});
  EXPECT_TRUE(engine_->requests().empty());
}

// Nothing that is accepted asks for something that is not done; what asks for nothing is accepted.
TEST_F(OpenAiFieldsTest, FieldsThatAskForNothingAreAccepted) {
  Start();
  Complete({{"prompt", "x"},
            {"best_of", 1},
            {"suffix", ""},
            {"logit_bias", json::object()},
            {"n", 1},
            {"response_format", {{"type", "text"}}}});
  for (const char* field : {R"("length_penalty": 1)",
                            R"("length_penalty": 1.0)",
                            R"("use_beam_search": false)",
                            R"("guided_json": "")",
                            R"("guided_choice": [])",
                            R"("structured_outputs": {})",
                            R"("structured_outputs": {"json": null, "regex": ""})",
                            R"("truncate_prompt_tokens": -1)",
                            R"("response_format": {})",
                            R"("prompt_logprobs": 0)",
                            R"("bad_words": [])",
                            R"("json_schema": null)",
                            R"("chat_template": "")",
                            R"("tools": [])",
                            R"("tools": [{"type": "function"}], "tool_choice": "none")",
                            R"("functions": [{"name": "f"}], "function_call": "none")",
                            R"("max_tokens": 16.0)",
                            R"("n": 1.0)",
                            R"("top_k": -1.0)",
                            R"("seed": 5.0)",
                            R"("stop_token_ids": [5.0])",
                            R"("priority": -2.0)"}) {
    const ClientResponse response = client_->Post("/v1/completions", absl::StrCat("{\"prompt\": [3.0], ", field, "}"));
    EXPECT_EQ(response.status, 200) << field << response.body;
  }
  EXPECT_EQ(engine_->requests().at(17).sampling.max_tokens, 16);
  EXPECT_EQ(engine_->requests().at(20).sampling.seed, 5u);
  EXPECT_EQ(engine_->requests().back().prompt, std::vector<int32_t>({3}));
}

TEST_F(OpenAiFieldsTest, FieldsThatAskForWhatIsNotDoneAreRefused) {
  Start();
  for (const auto& [name, value] : std::vector<std::pair<const char*, json>>{{"length_penalty", 1.5},
                                                                             {"length_penalty", 0},
                                                                             {"use_beam_search", true},
                                                                             {"guided_json", "{}"},
                                                                             {"guided_json", {{"type", "object"}}},
                                                                             {"guided_choice", {""}},
                                                                             {"structured_outputs", {{"regex", "a"}}},
                                                                             {"truncate_prompt_tokens", 0},
                                                                             {"truncate_prompt_tokens", 5},
                                                                             {"prompt_logprobs", 1},
                                                                             {"prompt_logprobs", -1},
                                                                             {"tools", {{{"type", "function"}}}},
                                                                             {"functions", {{{"name", "f"}}}}}) {
    const ClientResponse response = client_->Post("/v1/completions", json({{"prompt", "x"}, {name, value}}).dump());
    EXPECT_EQ(response.status, 400) << name << value;
    EXPECT_EQ(Parse(response.body)["error"]["param"], name);
  }
  EXPECT_TRUE(engine_->requests().empty());
}

// -1, as vLLM and its clients have it, is no seed; every other number is one.
TEST_F(OpenAiFieldsTest, SeedsThatAreRandom) {
  Start();
  const auto seed_of = [this](const char* seed) {
    EXPECT_EQ(client_->Post("/v1/completions", absl::StrCat("{\"prompt\": \"x\", \"seed\": ", seed, "}")).status, 200);
    return engine_->requests().back().sampling.seed;
  };
  for (const char* random : {"-1", "-1.0", "null"}) EXPECT_NE(seed_of(random), seed_of(random)) << random;
  EXPECT_EQ(seed_of("0"), 0u);
  EXPECT_EQ(seed_of("-2"), static_cast<uint64_t>(-2));
  EXPECT_EQ(seed_of("18446744073709551615"), ~uint64_t{0});
}

}  // namespace
}  // namespace cachalot
