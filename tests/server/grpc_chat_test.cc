// The gRPC endpoint: chats, unary calls, several answers, what is refused and how, slow clients.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/server/grpc_testing.h"

namespace cachalot {
namespace {

using Stub = v1::Cachalot::Stub;

class GrpcChatTest : public GrpcTest {
 protected:
  std::vector<int32_t> Ids(std::string_view text) { return *tokenizer_->Encode(text); }
  // The script of an engine that answers with this text. The tokenizer is needed before the engine.
  static std::vector<int32_t> Script(std::string_view text) {
    auto tokenizer = Tokenizer::Load(CACHALOT_TEST_DATA_DIR "/golden/data/v3_like");
    std::vector<int32_t> ids = *(*tokenizer)->Encode(text);
    ids.push_back(FakeEngine::kEos);
    return ids;
  }
  static std::string FieldOf(const grpc::ClientContext& context) {
    const auto& metadata = context.GetServerTrailingMetadata();
    const auto found = metadata.find("cachalot-field");
    return found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
  }
};

v1::ChatRequest Chat(const std::string& content) {
  v1::ChatRequest request;
  v1::ChatMessage* message = request.mutable_prompt()->add_messages();
  message->set_role("user");
  message->set_content(content);
  return request;
}

TEST_F(GrpcChatTest, StreamsReasoningAndText) {
  Start({.script = Script("He thinks\n</think>\n\nHello world"), .tokens_per_delta = 2}, "r1");
  grpc::ClientContext context;
  const auto reader = stub_->Chat(&context, Chat("Hi"));
  std::string reasoning, text;
  v1::ChatResponse response;
  std::vector<int32_t> ids;
  while (reader->Read(&response)) {
    reasoning += response.reasoning();
    text += response.text();
    ids.insert(ids.end(), response.token_ids().begin(), response.token_ids().end());
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(reasoning, "He thinks");
  EXPECT_EQ(text, "Hello world");
  EXPECT_EQ(ids, Script("He thinks\n</think>\n\nHello world"));
  EXPECT_EQ(response.finish_reason(), v1::FINISH_REASON_STOP);
  const Request sent = engine_->requests().at(0);
  EXPECT_EQ(sent.prompt, Ids("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"));
  EXPECT_EQ(sent.sampling.max_tokens, 256 - static_cast<int>(sent.prompt.size()));
  EXPECT_EQ(response.usage().prompt_tokens(), static_cast<int64_t>(sent.prompt.size()));
}

TEST_F(GrpcChatTest, AConversationIsWrittenAsItWasSent) {
  Start({}, "v3_1");
  v1::ChatRequest request = Chat("Weather?");
  v1::ChatPrompt* prompt = request.mutable_prompt();
  prompt->mutable_messages(0)->set_role("developer");
  v1::ChatMessage* call = prompt->add_messages();
  call->set_role("assistant");
  call->add_tool_calls()->set_name("look");
  call->mutable_tool_calls(0)->set_arguments("{}");
  v1::ChatMessage* output = prompt->add_messages();
  output->set_role("tool");
  output->set_content("Rain");
  v1::ChatMessage* last = prompt->add_messages();
  last->set_role("assistant");
  last->set_content("It");
  last->set_prefix(true);
  prompt->set_continue_final_message(true);
  prompt->set_thinking(true);
  request.mutable_sampling()->set_max_tokens(1);
  grpc::ClientContext context;
  v1::ChatUnaryResponse response;
  ASSERT_TRUE(stub_->ChatUnary(&context, request, &response).ok());
  EXPECT_EQ(tokenizer_->Decode(engine_->requests().at(0).prompt, /*skip_special=*/false),
            "<｜begin▁of▁sentence｜>Weather?<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{}"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁output▁begin｜>Rain"
            "<｜tool▁output▁end｜>It");
}

TEST_F(GrpcChatTest, UnaryCallsGiveAllAnswersByIndex) {
  Start({.script = {300, 303}, .add_choice = true}, "v3");
  v1::ChatRequest chat = Chat("Hi");
  chat.mutable_sampling()->set_max_tokens(3);
  chat.set_n(3);
  chat.set_logprobs(0);
  grpc::ClientContext chat_context, context;
  v1::ChatUnaryResponse answered;
  ASSERT_TRUE(stub_->ChatUnary(&chat_context, chat, &answered).ok());
  ASSERT_EQ(answered.answers_size(), 3);
  for (int i = 0; i < 3; ++i) {
    const v1::ChatResponse& answer = answered.answers(i);
    EXPECT_EQ(answer.index(), i);
    ASSERT_EQ(answer.token_ids_size(), 3);
    EXPECT_EQ(answer.token_ids(1), 303 + i);
    EXPECT_EQ(answer.logprobs_size(), 3);
    EXPECT_EQ(answer.finish_reason(), v1::FINISH_REASON_LENGTH);
  }
  EXPECT_EQ(answered.usage().prompt_tokens(), answered.answers(0).usage().prompt_tokens());
  EXPECT_EQ(answered.usage().completion_tokens(), 9);

  v1::CompleteRequest request = TextRequest("Hello", 200);
  request.add_stop("o wo");
  v1::CompleteUnaryResponse completed;
  ASSERT_TRUE(stub_->CompleteUnary(&context, request, &completed).ok());
  ASSERT_EQ(completed.answers_size(), 1);
  EXPECT_EQ(completed.answers(0).text(), "Hell");
  EXPECT_EQ(completed.answers(0).stop_string(), "o wo");
}

TEST_F(GrpcChatTest, AnswersOfAStreamHaveAnIndex) {
  Start({.script = {300, 303}, .add_choice = true});
  v1::CompleteRequest request = TextRequest("x", 5);
  request.set_n(4);
  std::map<int, std::vector<int32_t>> tokens;
  int num_last = 0;
  const Answer answer = Complete(request);
  EXPECT_TRUE(answer.status.ok());
  for (const v1::CompleteResponse& response : answer.responses) {
    for (const int32_t id : response.token_ids()) tokens[response.index()].push_back(id);
    num_last += response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
  }
  EXPECT_EQ(num_last, 4);
  ASSERT_EQ(tokens.size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(tokens[i], std::vector<int32_t>({300 + i, 303 + i, 300 + i, 303 + i, 300 + i}));
}

TEST_F(GrpcChatTest, WhatARequestAsksReachesTheEngine) {
  Start({}, "v3");
  v1::ChatRequest request = Chat("Hi");
  v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->set_max_tokens(5);
  sampling->set_min_tokens(3);
  (*sampling->mutable_logit_bias())[7] = -2.5;
  request.set_priority(-4);
  grpc::ClientContext context;
  const absl::Time deadline = absl::Now() + absl::Seconds(100);
  context.set_deadline(absl::ToChronoTime(deadline));
  v1::ChatUnaryResponse response;
  ASSERT_TRUE(stub_->ChatUnary(&context, request, &response).ok());
  const auto sent = engine_->requests().at(0);
  EXPECT_EQ(sent.sampling.min_tokens, 3);
  EXPECT_EQ(sent.sampling.logit_bias, (std::vector<std::pair<int32_t, float>>{{7, -2.5f}}));
  EXPECT_EQ(sent.priority, -4);
  EXPECT_LT(absl::AbsDuration(sent.deadline - deadline), absl::Seconds(5));
  // Another channel is another connection, unless the two share one.
  grpc::ChannelArguments own_connection;
  own_connection.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto channel = grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", server_->port()),
                                                 grpc::InsecureChannelCredentials(), own_connection);
  grpc::ClientContext first, second;
  ASSERT_TRUE(stub_->ChatUnary(&first, request, &response).ok());
  ASSERT_TRUE(v1::Cachalot::NewStub(channel)->ChatUnary(&second, request, &response).ok());
  EXPECT_NE(sent.client, "");
  EXPECT_EQ(engine_->requests().at(1).client, sent.client);
  EXPECT_NE(engine_->requests().at(2).client, sent.client);
}

TEST_F(GrpcChatTest, ErrorsNameTheField) {
  Start({.max_model_len = 32}, "v3");
  using Spoil = std::function<void(v1::ChatRequest*)>;
  const std::pair<const char*, Spoil> kCases[] = {
      {"temperature", [](auto* r) { r->mutable_sampling()->set_temperature(-1); }},
      {"max_tokens", [](auto* r) { r->mutable_sampling()->set_max_tokens(-1); }},
      {"max_tokens", [](auto* r) { r->mutable_sampling()->set_max_tokens(0); }},
      {"min_tokens", [](auto* r) { r->mutable_sampling()->set_min_tokens(-1); }},
      {"top_k", [](auto* r) { r->mutable_sampling()->set_top_k(-2); }},
      {"logit_bias", [](auto* r) { (*r->mutable_sampling()->mutable_logit_bias())[-7] = 1; }},
      {"logprobs", [](auto* r) { r->set_logprobs(-1); }},
      {"logprobs", [](auto* r) { r->set_logprobs(21); }},
      {"stop", [](auto* r) { r->add_stop(""); }},
      {"n", [](auto* r) { r->set_n(0); }},
      {"n", [](auto* r) { r->set_n(129); }},
      {"messages", [](auto* r) { r->mutable_prompt()->mutable_messages(0)->set_role("robot"); }},
      {"messages", [](auto* r) { r->mutable_prompt()->mutable_messages(0)->clear_role(); }},
      {"messages", [](auto* r) { r->mutable_prompt()->mutable_messages(0)->clear_content(); }},
      {"messages", [](auto* r) { r->mutable_prompt()->mutable_messages(0)->add_tool_calls(); }},
      {"messages", [](auto* r) { r->clear_prompt(); }},
      {"messages", [](auto* r) { r->mutable_prompt()->mutable_messages(0)->set_content(std::string(99, '!')); }},
      {"continue_final_message", [](auto* r) { r->mutable_prompt()->set_continue_final_message(true); }},
  };
  for (const auto& [field, spoil] : kCases) {
    v1::ChatRequest request = Chat("Hi");
    spoil(&request);
    grpc::ClientContext unary_context, context;
    v1::ChatUnaryResponse response;
    const grpc::Status status = stub_->ChatUnary(&unary_context, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << field;
    EXPECT_NE(status.error_message().find(field), std::string::npos) << status.error_message();
    EXPECT_EQ(FieldOf(unary_context), field);
    const auto reader = stub_->Chat(&context, request);
    EXPECT_EQ(reader->Finish().error_message(), status.error_message());
    EXPECT_EQ(FieldOf(context), field);
  }
  EXPECT_TRUE(engine_->requests().empty());
}

TEST_F(GrpcChatTest, OtherErrors) {
  Start();
  grpc::ClientContext contexts[4];
  v1::ChatUnaryResponse response;
  const grpc::Status unknown = stub_->ChatUnary(&contexts[0], Chat("Hi"), &response);  // no template
  EXPECT_EQ(unknown.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FieldOf(contexts[0]), "messages");
  v1::ModelInfoRequest other;
  other.set_model("other");
  v1::ModelInfoResponse info;
  EXPECT_EQ(stub_->ModelInfo(&contexts[1], other, &info).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(FieldOf(contexts[1]), "model");
  v1::CompleteUnaryResponse completed;
  EXPECT_EQ(stub_->CompleteUnary(&contexts[2], {}, &completed).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FieldOf(contexts[2]), "prompt");
  const grpc::Status large = stub_->CompleteUnary(&contexts[3], TextRequest(std::string(17 << 20, 'x'), 1), &completed);
  EXPECT_EQ(large.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

// Strings of proto3 are UTF-8. Field 1 of every request is one: "\xC3(" is no UTF-8, and "\x7Fx" is cut off.
TEST_F(GrpcChatTest, RequestsThatCannotBeParsed) {
  Start();
  for (const char* method : {"Complete", "CompleteUnary", "Chat", "ChatUnary", "Tokenize", "Detokenize", "ModelInfo"}) {
    for (const char* bytes : {"\x0A\x02\xC3(", "\x0A\x7Fx"}) {
      std::string response;
      const grpc::Status status = CallByName(absl::StrCat("/cachalot.v1.Cachalot/", method), bytes, &response);
      EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
      EXPECT_NE(status.error_message().find("UTF-8"), std::string::npos);
    }
  }
}

TEST_F(GrpcChatTest, TokenizeDetokenizeAndModelInfo) {
  Start({}, "v3_0324");
  grpc::ClientContext contexts[6];
  v1::TokenizeRequest text, chat;
  v1::TokenizeResponse tokens;
  text.set_text("Hello world");
  ASSERT_TRUE(stub_->Tokenize(&contexts[0], text, &tokens).ok());
  EXPECT_EQ(std::vector<int32_t>(tokens.token_ids().begin(), tokens.token_ids().end()),
            std::vector<int32_t>({0, Ids("Hello world")[0], Ids("Hello world")[1]}));
  EXPECT_EQ(tokens.max_model_len(), 256);
  *chat.mutable_chat() = Chat("Hi<｜User｜>").prompt();
  ASSERT_TRUE(stub_->Tokenize(&contexts[1], chat, &tokens).ok());
  EXPECT_EQ(std::count(tokens.token_ids().begin(), tokens.token_ids().end(), Ids("<｜User｜>")[0]), 1);

  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse written;
  ASSERT_TRUE(stub_->Detokenize(&contexts[2], detokenize, &written).ok());
  EXPECT_EQ(written.text(), "<｜begin▁of▁sentence｜><｜User｜>Hi<｜User｜><｜Assistant｜>");
  detokenize.add_token_ids(-1);
  EXPECT_EQ(stub_->Detokenize(&contexts[3], detokenize, &written).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(FieldOf(contexts[3]), "token_ids");
  EXPECT_EQ(stub_->Tokenize(&contexts[4], {}, &tokens).error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  v1::ModelInfoResponse info;
  ASSERT_TRUE(stub_->ModelInfo(&contexts[5], {}, &info).ok());
  EXPECT_EQ(info.model(), "model");
  EXPECT_EQ(info.chat_template(), "v3_0324");
  EXPECT_EQ(info.vocab_size(), 320);
  EXPECT_EQ(info.max_model_len(), 256);
  EXPECT_TRUE(info.has_tokenizer());
}

// --- Clients that go, and clients that are slow ---

TEST_F(GrpcChatTest, CancellingAUnaryCallCancelsEveryAnswer) {
  Start({.step = absl::Milliseconds(5)}, "v3");
  v1::ChatRequest request = Chat("Hi");
  request.set_n(3);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Milliseconds(200)));
  v1::ChatUnaryResponse response;
  EXPECT_EQ(stub_->ChatUnary(&context, request, &response).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(engine_->AwaitCancels(3));
  EXPECT_TRUE(engine_->AwaitIdle());
}

TEST_F(GrpcChatTest, WhatWaitsForASlowClientIsMerged) {
  constexpr int kTokens = 60'000;
  Start({.script = {300, 303}, .max_model_len = kTokens + 100});
  grpc::ClientContext context;
  v1::CompleteRequest request = TextRequest("x", kTokens);
  request.set_n(2);
  const auto reader = stub_->Complete(&context, request);
  ASSERT_TRUE(engine_->AwaitIdle(absl::Seconds(60)));
  // All is generated and none of it is read: what the connection did not take waits, in few responses.
  std::map<int, std::string> texts;
  std::map<int, int> num_tokens;
  int num_responses = 0;
  for (v1::CompleteResponse response; reader->Read(&response); ++num_responses) {
    texts[response.index()] += response.text();
    num_tokens[response.index()] += response.token_ids_size();
  }
  EXPECT_TRUE(reader->Finish().ok());
  std::string expected;
  for (int i = 0; i < kTokens / 2; ++i) expected += "Hello world";
  for (const int index : {0, 1}) {
    EXPECT_EQ(num_tokens[index], kTokens);
    EXPECT_TRUE(texts[index] == expected);
  }
  EXPECT_LT(num_responses, kTokens);
  RecordProperty("num_responses", num_responses);
}

TEST_F(GrpcChatTest, ClientsThatGoAtAnyMoment) {
  Start({.script = Script("Hello world"), .step = absl::Microseconds(100)}, "v3");
  std::vector<std::thread> threads;
  std::atomic<int> num_whole = 0, num_cancelled = 0;
  for (int i = 0; i < 64; ++i) {
    threads.emplace_back([this, i, &num_whole, &num_cancelled] {
      std::mt19937 random(i);
      for (int round = 0; round < 5; ++round) {
        v1::ChatRequest request = Chat("Hi");
        request.mutable_sampling()->set_ignore_eos(round % 2 == 0);
        request.set_n(1 + round % 3);
        grpc::ClientContext context;
        const auto reader = stub_->Chat(&context, request);
        int reads_left = random() % 12;
        for (v1::ChatResponse response; reader->Read(&response);) {
          if (--reads_left == 0) context.TryCancel();
        }
        const grpc::StatusCode code = reader->Finish().error_code();
        num_whole += code == grpc::StatusCode::OK;
        num_cancelled += code == grpc::StatusCode::CANCELLED;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_whole + num_cancelled, 64 * 5);
  EXPECT_GT(num_whole, 10);
  EXPECT_GT(num_cancelled, 10);
  EXPECT_TRUE(engine_->AwaitIdle(absl::Seconds(20)));
}

}  // namespace
}  // namespace cachalot
