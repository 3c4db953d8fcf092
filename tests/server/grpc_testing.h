// What the tests of the gRPC endpoint share: a server over the fake engine, and clients of it.
#ifndef CACHALOT_TESTS_SERVER_GRPC_TESTING_H_
#define CACHALOT_TESTS_SERVER_GRPC_TESTING_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "server/grpc/grpc_server.h"
#include "tests/server/fake_engine.h"

namespace cachalot {

class GrpcTest : public testing::Test {
 protected:
  void Start(FakeEngineOptions options = {}, std::string_view chat_template = "", const SamplingParams& sampling = {}) {
    auto tokenizer = Tokenizer::Load(CACHALOT_TEST_DATA_DIR "/golden/data/v3_like");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = std::move(*tokenizer);
    engine_ = std::make_unique<FakeEngine>(std::move(options));
    generator_ = std::make_unique<Generator>(
        engine_.get(), tokenizer_.get(),
        GeneratorOptions{.chat_template = ChatTemplate::ParseName(chat_template), .sampling = sampling});
    server_ = std::make_unique<GrpcServer>(front_options_);
    ASSERT_TRUE(server_->Bind().ok());
    ASSERT_TRUE(server_->Start(max_connections_, generator_.get(), "model").ok());
    channel_ = grpc::CreateChannel(absl::StrCat("127.0.0.1:", server_->port()), grpc::InsecureChannelCredentials());
    stub_ = v1::Cachalot::NewStub(channel_);
  }
  void TearDown() override {
    if (server_ == nullptr) return;
    generator_->Stop();
    engine_ = nullptr;
    server_ = nullptr;
  }

  struct Answer {
    grpc::Status status;
    std::string text;
    std::vector<v1::CompleteResponse> responses;
  };
  Answer Complete(const v1::CompleteRequest& request, grpc::ClientContext* context) {
    Answer answer;
    const auto reader = stub_->Complete(context, request);
    for (v1::CompleteResponse response; reader->Read(&response);) {
      answer.text += response.text();
      answer.responses.push_back(response);
    }
    answer.status = reader->Finish();
    return answer;
  }
  Answer Complete(const v1::CompleteRequest& request) {
    grpc::ClientContext context;
    return Complete(request, &context);
  }

  // A unary call by name, for services whose stubs we do not have; messages as bytes.
  grpc::Status CallByName(const std::string& method, const std::string& request, std::string* response) {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    const grpc::Slice slice(request);
    grpc::ByteBuffer in(&slice, 1), out;
    grpc::Status result;
    absl::Notification done;
    stub.UnaryCall(&context, method, grpc::StubOptions(), &in, &out, [&](grpc::Status status) {
      result = std::move(status);
      done.Notify();
    });
    done.WaitForNotification();
    std::vector<grpc::Slice> slices;
    if (result.ok() && out.Dump(&slices).ok()) {
      for (const grpc::Slice& part : slices) response->append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
    return result;
  }

  GrpcFrontOptions front_options_;
  int max_connections_ = 100;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Generator> generator_;
  std::unique_ptr<GrpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Cachalot::Stub> stub_;
};

inline v1::CompleteRequest TextRequest(const std::string& text, int max_tokens) {
  v1::CompleteRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  return request;
}

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_GRPC_TESTING_H_
