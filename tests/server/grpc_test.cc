// The gRPC endpoint in this process: answers, errors, cancellation, deadlines, health and reflection.
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/server/grpc_testing.h"

namespace cachalot {
namespace {

TEST_F(GrpcTest, StreamsAnAnswer) {
  Start({.script = {300, 303}});  // "Hello", " world"
  v1::CompleteRequest request = TextRequest("Hello", 4);
  request.set_model("model");
  request.set_logprobs(1);
  const Answer answer = Complete(request);
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.text, "Hello worldHello world");
  ASSERT_EQ(answer.responses.size(), 4u);
  EXPECT_EQ(answer.responses[0].token_ids(0), 300);
  EXPECT_EQ(answer.responses[0].logprobs(0).token(), "Hello");
  EXPECT_EQ(answer.responses[0].logprobs(0).logprob(), FakeEngine::LogprobOf(300));
  EXPECT_EQ(answer.responses[0].logprobs(0).top_size(), 1);
  EXPECT_EQ(answer.responses[0].finish_reason(), v1::FINISH_REASON_UNSPECIFIED);
  EXPECT_FALSE(answer.responses[0].has_usage());
  EXPECT_EQ(answer.responses[3].finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(answer.responses[3].usage().prompt_tokens(), 2);
  EXPECT_EQ(answer.responses[3].usage().completion_tokens(), 4);
}

TEST_F(GrpcTest, ParametersReachTheEngine) {
  Start();
  v1::CompleteRequest request;
  for (const int32_t id : {3, 4}) request.mutable_token_ids()->add_ids(id);
  v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_top_p(0.5);
  sampling->set_top_k(7);
  sampling->set_seed(42);
  sampling->set_ignore_eos(true);
  sampling->add_stop_token_ids(9);
  request.set_echo(true);
  request.set_logprobs(2);
  EXPECT_TRUE(Complete(request).status.ok());
  const auto sent = engine_->requests().at(0);
  EXPECT_EQ(sent.prompt, std::vector<int32_t>({3, 4}));
  EXPECT_EQ(sent.sampling.temperature, 0);
  EXPECT_EQ(sent.sampling.top_p, 0.5f);
  EXPECT_EQ(sent.sampling.top_k, 7);
  EXPECT_EQ(sent.sampling.seed, 42u);
  EXPECT_EQ(sent.sampling.max_tokens, 16);
  EXPECT_TRUE(sent.sampling.ignore_eos);
  EXPECT_EQ(sent.sampling.stop_token_ids, std::vector<int32_t>({9}));
  EXPECT_EQ(sent.sampling.prompt_logprobs, 2);
}

TEST_F(GrpcTest, StopStringsEndTheAnswer) {
  Start({.script = {300, 303}, .step = absl::Milliseconds(1)});
  v1::CompleteRequest request = TextRequest("x", 200);
  request.add_stop("lo w");
  const Answer answer = Complete(request);
  EXPECT_TRUE(answer.status.ok());
  EXPECT_EQ(answer.text, "Hel");
  EXPECT_EQ(answer.responses.back().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_TRUE(engine_->AwaitCancels(1));
}

TEST_F(GrpcTest, ErrorsAreStatusCodes) {
  Start({.fail_after = 1});
  v1::CompleteRequest request = TextRequest("x", 4);
  request.set_model("other");
  EXPECT_EQ(Complete(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Complete({}).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request = TextRequest("x", 4);
  request.mutable_sampling()->set_temperature(-1);
  const Answer wrong = Complete(request);
  EXPECT_EQ(wrong.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(wrong.status.error_message().find("temperature"), std::string::npos);
  const Answer failed = Complete(TextRequest("x", 4));
  EXPECT_EQ(failed.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(failed.responses.size(), 1u);
}

TEST_F(GrpcTest, AFullQueueIsResourceExhausted) {
  Start({.max_requests = 0});
  EXPECT_EQ(Complete(TextRequest("x", 4)).status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(GrpcTest, CancellingCancelsTheRequest) {
  Start({.step = absl::Milliseconds(5)});
  grpc::ClientContext context;
  const auto reader = stub_->Complete(&context, TextRequest("x", 250));
  v1::CompleteResponse response;
  ASSERT_TRUE(reader->Read(&response));
  context.TryCancel();
  EXPECT_TRUE(engine_->AwaitCancels(1));
  EXPECT_TRUE(engine_->AwaitIdle());
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(GrpcTest, ADeadlineCancelsTheRequest) {
  Start({.step = absl::Milliseconds(20)});
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  EXPECT_EQ(Complete(TextRequest("x", 250), &context).status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(engine_->AwaitCancels(1));
}

TEST_F(GrpcTest, StoppingEndsWhatIsInFlight) {
  Start({.step = absl::Milliseconds(5)});
  grpc::ClientContext context;
  const auto reader = stub_->Complete(&context, TextRequest("x", 250));
  v1::CompleteResponse response;
  ASSERT_TRUE(reader->Read(&response));
  generator_->Stop();
  engine_ = nullptr;
  server_->Stop(absl::Seconds(5));
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(GrpcTest, ManyCallsAtOnce) {
  Start({.script = {300, 303}, .tokens_per_delta = 2});
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this] {
      for (int k = 0; k < 10; ++k) {
        const Answer answer = Complete(TextRequest("x", 20));
        EXPECT_TRUE(answer.status.ok());
        EXPECT_EQ(answer.text.size(), 10 * std::string("Hello world").size());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(GrpcTest, Health) {
  Start();
  // HealthCheckResponse{status}: field 1; SERVING = 1, NOT_SERVING = 2. The request names a service in field 1.
  const std::string service = CachalotService::service_full_name();
  const std::string by_name = absl::StrCat("\x0A", std::string(1, static_cast<char>(service.size())), service);
  for (const std::string& request : {std::string(), by_name}) {
    std::string response;
    ASSERT_TRUE(CallByName("/grpc.health.v1.Health/Check", request, &response).ok());
    EXPECT_EQ(response, "\x08\x01");
  }
  server_->SetServing(false);
  std::string response;
  ASSERT_TRUE(CallByName("/grpc.health.v1.Health/Check", by_name, &response).ok());
  EXPECT_EQ(response, "\x08\x02");
}

TEST_F(GrpcTest, ReflectionListsTheService) {
  Start();
  // A stream of one request, ServerReflectionRequest{list_services = "*"} (field 7), sent as a unary call.
  std::string response;
  ASSERT_TRUE(
      CallByName("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "\x3A\x01*", &response).ok());
  EXPECT_NE(response.find("cachalot.v1.Cachalot"), std::string::npos);
  EXPECT_NE(response.find("grpc.health.v1.Health"), std::string::npos);
}

TEST_F(GrpcTest, TellsAPortThatIsTaken) {
  Start();
  GrpcServer second({.port = server_->port()});
  const absl::Status status = second.Bind();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find(absl::StrCat(server_->port())), absl::string_view::npos);
}

}  // namespace
}  // namespace cachalot
