// Chats over real sockets and a fake engine, and what all streams owe to clients that are slow, and to a drain.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/http/completion_call.h"
#include "tests/server/openai_testing.h"

namespace cachalot {
namespace {

using nlohmann::json;

constexpr char kHello[] = R"("messages":[{"role":"user","content":"Hello"}])";

class ChatCompletionsTest : public OpenAiServerTest {
 protected:
  json Chat(const std::string& fields) {
    const ClientResponse response = client_->Post("/v1/chat/completions", absl::StrCat("{", kHello, ",", fields, "}"));
    EXPECT_EQ(response.status, 200) << response.body;
    return json::parse(response.body, nullptr, /*allow_exceptions=*/false);
  }
};

std::string RawRequest(const std::string& path, const std::string& body) {
  return absl::StrCat("POST ", path, " HTTP/1.1\r\nConnection: close\r\nContent-Length: ", body.size(), "\r\n\r\n",
                      body);
}

// The data of a stream's events, [DONE] left out.
std::vector<json> Events(const std::string& body) {
  std::vector<json> events;
  for (absl::string_view event : absl::StrSplit(body, "\n\n", absl::SkipEmpty())) {
    if (event == "data: [DONE]") continue;
    events.push_back(json::parse(event.substr(6), nullptr, /*allow_exceptions=*/false));
    EXPECT_TRUE(events.back().is_object()) << event;
  }
  return events;
}

TEST_F(ChatCompletionsTest, AllParametersReachTheEngine) {
  Start();
  const absl::Time before = absl::Now();
  Chat(R"("max_tokens":9,"max_completion_tokens":5,"min_tokens":2,"logit_bias":{"7":1.5,"8":-100},"priority":-3,
          "timeout":30,"logprobs":true,"top_logprobs":4,"seed":9)");
  const Request request = engine_->requests().at(0);
  EXPECT_EQ(request.sampling.max_tokens, 5);  // the newer name counts
  EXPECT_EQ(request.sampling.min_tokens, 2);
  EXPECT_EQ(request.sampling.logit_bias, (std::vector<std::pair<int32_t, float>>{{7, 1.5f}, {8, -100.0f}}));
  EXPECT_EQ(request.sampling.logprobs, 4);
  EXPECT_EQ(request.sampling.seed, 9u);
  EXPECT_EQ(request.priority, -3);
  EXPECT_GE(request.deadline, before + absl::Seconds(30));
  EXPECT_LE(request.deadline, absl::Now() + absl::Seconds(30));
  Chat(R"("logprobs":true,"stop":"d","include_stop_str_in_output":true,"skip_special_tokens":false)");
  EXPECT_EQ(engine_->requests().at(1).sampling.logprobs, 0);
  EXPECT_EQ(engine_->requests().at(1).deadline, absl::InfiniteFuture());
  // Without a limit: what the context holds.
  EXPECT_EQ(engine_->requests().at(1).sampling.max_tokens,
            256 - static_cast<int>(engine_->requests().at(1).prompt.size()));
}

TEST_F(ChatCompletionsTest, ReasoningIsApart) {
  std::vector<int32_t> script = Ids("I think</think>\n\nYes");
  const int num_tokens = static_cast<int>(script.size());
  Start({.script = script}, /*with_tokenizer=*/true, "r1");
  const json answer = Chat(absl::StrCat("\"max_tokens\":", num_tokens));
  EXPECT_EQ(answer["choices"][0]["message"]["content"], "Yes");
  EXPECT_EQ(answer["choices"][0]["message"]["reasoning_content"], "I think");
}

TEST_F(ChatCompletionsTest, LargeBodiesAreReadToo) {
  Start({.max_model_len = 1 << 20});
  const std::string body = json({{"prompt", std::string(500'000, 'x')}, {"max_tokens", 2}}).dump();
  EXPECT_EQ(client_->Post("/v1/completions", body).status, 200);
  EXPECT_EQ(client_->Post("/v1/completions", body.substr(1)).status, 400);
}

// A client that does not read gets everything once it does, in fewer events than tokens.
TEST_F(ChatCompletionsTest, SlowClientsGetLongerEvents) {
  const int num_tokens = 60'000;
  Start({.tokens_per_delta = 1, .max_model_len = 1 << 20});
  RawHttpClient slow(server_->port(), /*receive_buffer_bytes=*/4096);
  slow.Send(
      RawRequest("/v1/chat/completions", absl::StrCat("{", kHello, R"(,"stream":true,"ignore_eos":true,"max_tokens":)",
                                                      num_tokens, R"(,"stream_options":{"include_usage":true}})")));
  while (engine_->requests().empty()) absl::SleepFor(absl::Milliseconds(1));
  ASSERT_TRUE(engine_->AwaitIdle(absl::Seconds(60)));
  const ClientResponse response = slow.ReadResponse();
  const std::vector<json> events = Events(response.body);
  ASSERT_GT(events.size(), 3u);
  EXPECT_LT(events.size(), static_cast<size_t>(num_tokens) / 2);
  std::string text;
  for (const json& event : events) {
    if (!event["choices"].empty()) text += event["choices"][0]["delta"].value("content", "");
  }
  std::vector<int32_t> ids;
  for (int i = 0; i < num_tokens; ++i) ids.push_back(10 + i % 3);  // FakeEngineOptions::script
  EXPECT_EQ(text, tokenizer_->Decode(ids, /*skip_special=*/true));
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], num_tokens);
}

TEST_F(ChatCompletionsTest, AClientIsAConnection) {
  Start();
  Chat(R"("n":2)");
  Chat(R"("max_tokens":1)");
  RawHttpClient other(server_->port());
  other.Send(RawRequest("/v1/chat/completions", absl::StrCat("{", kHello, "}")));
  EXPECT_EQ(other.ReadResponse().status, 200);
  const auto requests = engine_->requests();
  ASSERT_EQ(requests.size(), 4u);
  EXPECT_NE(requests[0].client, "");
  EXPECT_EQ(requests[1].client, requests[0].client);
  EXPECT_EQ(requests[2].client, requests[0].client);
  EXPECT_NE(requests[3].client, requests[0].client);
}

// Log-probabilities cannot be joined: a client that lets too many of them wait loses its answer, and only it does.
TEST_F(ChatCompletionsTest, TooManyLogprobsThatWaitEndTheRequest) {
  const int num_tokens = static_cast<int>(CompletionCall::kMaxHeldScores) / 21 * 2;  // sockets hold some, too
  Start({.tokens_per_delta = 4, .max_model_len = 1 << 20});
  RawHttpClient slow(server_->port(), /*receive_buffer_bytes=*/4096);
  slow.Send(RawRequest(
      "/v1/completions",
      absl::StrCat(R"({"prompt":"x","stream":true,"ignore_eos":true,"logprobs":20,"max_tokens":)", num_tokens, "}")));
  EXPECT_TRUE(engine_->AwaitCancels(1, absl::Seconds(60)));
  EXPECT_EQ(Chat("\"max_tokens\":1")["usage"]["completion_tokens"], 1);
  const ClientResponse response = slow.ReadResponse();
  EXPECT_NE(response.body.find("too slowly"), std::string::npos);
  EXPECT_EQ(response.body.find("[DONE]"), std::string::npos);
}

TEST_F(ChatCompletionsTest, TooManyLogprobsForOneAnswerAreRefused) {
  Start({.tokens_per_delta = 64, .max_model_len = 1 << 20});
  const int num_tokens = static_cast<int>(CompletionCall::kMaxHeldScores) / 21 + 1000;
  const ClientResponse response =
      client_->Post("/v1/completions",
                    absl::StrCat(R"({"prompt":"x","ignore_eos":true,"logprobs":20,"max_tokens":)", num_tokens, "}"));
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(json::parse(response.body)["error"]["param"], "logprobs");
  EXPECT_TRUE(engine_->AwaitIdle());
}

// Time grows as the body's length does, whatever is in it.
TEST_F(ChatCompletionsTest, ManyObjectsAreReadAtOnce) {
  Start();
  std::string objects = "{}", keys = "\"0\":{}";
  for (int i = 1; i < 150'000; ++i) objects += ",{}";
  for (int i = 1; i < 50'000; ++i) absl::StrAppend(&keys, ",\"", i, "\":{}");
  for (const std::string& extra : {absl::StrCat("[", objects, "]"), absl::StrCat("{", keys, "}")}) {
    const std::string body = absl::StrCat(R"({"prompt":"x","max_tokens":1,"x":)", extra, "}");
    EXPECT_EQ(client_->Post("/v1/completions", body).status, 200);
  }
  EXPECT_EQ(client_->Post("/v1/completions", absl::StrCat("{\"x\":[", objects, ",", objects, "]}")).status, 400);
  EXPECT_EQ(client_->Post("/v1/completions", std::string("{\"prompt\":\"x\"}\0{", 16)).status, 400);
}

TEST_F(ChatCompletionsTest, MoreAnswersThanTheQueueHoldsAreRefused) {
  Start({.max_waiting = 3});
  const ClientResponse response = client_->Post("/v1/completions", R"({"prompt":["x","y"],"n":2})");
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(json::parse(response.body)["error"]["param"], "n");
}

TEST_F(ChatCompletionsTest, APromptThatCannotFitIsRefusedUnread) {
  Start();
  const std::string body = json({{"prompt", std::string(15 << 20, ' ')}}).dump();
  const ClientResponse response = client_->Post("/v1/completions", body);
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(json::parse(response.body)["error"]["code"], "context_length_exceeded");
}

// Closing one's sending half is leaving: the work stops, and nothing that looks like an answer is sent.
TEST_F(ChatCompletionsTest, WhoStopsSendingLeaves) {
  Start({.step = absl::Milliseconds(5)});
  for (const char* stream : {"false", "true"}) {
    RawHttpClient leaving(server_->port());
    leaving.Send(RawRequest(
        "/v1/completions", absl::StrCat(R"({"prompt":"x","ignore_eos":true,"max_tokens":200,"stream":)", stream, "}")));
    leaving.CloseSendingHalf();
    leaving.ReadResponse();
    EXPECT_EQ(leaving.buffer().find("finish_reason\":\""), std::string::npos);
    EXPECT_EQ(leaving.buffer().find("DONE"), std::string::npos);
    EXPECT_TRUE(engine_->AwaitIdle());
  }
}

TEST_F(ChatCompletionsTest, ADrainEndsReadinessNotAnswers) {
  Start({.step = absl::Milliseconds(2)});
  RawHttpClient streaming(server_->port());
  streaming.Send(RawRequest("/v1/completions", R"({"prompt":"x","stream":true,"ignore_eos":true,"max_tokens":100})"));
  ASSERT_TRUE(streaming.ReadUntil("data: "));
  EXPECT_EQ(client_->Get("/readyz").status, 200);
  EXPECT_EQ(generator_->num_running(), 1);
  generator_->BeginDrain();
  EXPECT_EQ(RawHttpClient(server_->port()).Get("/readyz").status, 503);
  EXPECT_EQ(RawHttpClient(server_->port()).Get("/health").status, 200);
  EXPECT_EQ(RawHttpClient(server_->port()).Get("/metrics").status, 200);
  EXPECT_EQ(RawHttpClient(server_->port()).Post("/v1/completions", R"({"prompt":"x"})").status, 503);
  const ClientResponse response = streaming.ReadResponse();
  EXPECT_EQ(response.body.substr(response.body.size() - 14), "data: [DONE]\n\n");
  EXPECT_TRUE(engine_->AwaitIdle());
  for (int i = 0; i < 1000 && generator_->num_running() > 0; ++i) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_EQ(generator_->num_running(), 0);
}

}  // namespace
}  // namespace cachalot
