// GrpcFront before a gRPC server: connections that are too many, too slow or an attack; answers that nobody reads.
#include <gtest/gtest.h>

#include <optional>

#include "absl/strings/str_cat.h"
#include "tests/server/grpc_testing.h"
#include "tests/server/raw_http_client.h"

namespace cachalot {
namespace {

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const std::string kSettings("\0\0\0\4\0\0\0\0\0", 9);

class GrpcFrontTest : public GrpcTest {
 protected:
  // A client of its own connection gets an answer in time.
  bool Answers(absl::Duration timeout = absl::Seconds(10)) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    const auto stub = v1::Cachalot::NewStub(grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", server_->port()),
                                                                      grpc::InsecureChannelCredentials(), arguments));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    v1::ModelInfoResponse response;
    return stub->ModelInfo(&context, v1::ModelInfoRequest(), &response).ok();
  }
};

TEST_F(GrpcFrontTest, ConnectionsThatAreTooManyWait) {
  max_connections_ = 3;
  Start();
  std::optional<RawHttpClient> clients[4];
  for (auto& client : clients) {
    client.emplace(server_->port());
    client->Send(kPreface + kSettings);
  }
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(clients[i]->ReadUntil("\4"));  // the server's settings
  EXPECT_FALSE(clients[3]->HasBytesWithin(absl::Milliseconds(200)));
  clients[1].reset();
  EXPECT_TRUE(clients[3]->ReadUntil("\4"));
}

TEST_F(GrpcFrontTest, ConnectionsThatDoNotBeginAreClosed) {
  front_options_.begin_timeout = absl::Milliseconds(200);
  Start();
  RawHttpClient silent(server_->port()), half(server_->port()), begun(server_->port());
  half.Send(kPreface);
  begun.Send(kPreface + kSettings);
  EXPECT_FALSE(silent.ReadUntil("never"));
  EXPECT_FALSE(half.ReadUntil("never"));
  const std::string ping("\0\0\x8\6\0\0\0\0\0ABCDEFGH", 17);
  EXPECT_TRUE(begun.Send(ping));
  EXPECT_TRUE(begun.ReadUntil("ABCDEFGH"));  // its acknowledgement
}

TEST_F(GrpcFrontTest, AttacksAreCutAndOthersServed) {
  Start();
  for (const std::string& bytes : {std::string("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
                                   kPreface + kSettings + std::string("\0\0\1\x55\0\0\0\0\1x", 10)}) {
    RawHttpClient attacker(server_->port());
    bool is_cut = false;
    for (int i = 0; i < 100'000 && !is_cut; ++i)
      is_cut = !attacker.Send(i == 0 ? bytes : bytes.substr(bytes.size() - 10));
    EXPECT_TRUE(is_cut);
    EXPECT_TRUE(Answers());
  }
}

// With nothing to answer nobody is waited for: not for connections that stay, nor for streams that have no end.
TEST_F(GrpcFrontTest, StopsAtOnceWhenNoCallIsLeft) {
  Start();
  RawHttpClient silent(server_->port()), begun(server_->port());
  begun.Send(kPreface + kSettings);
  EXPECT_TRUE(begun.ReadUntil("\4"));
  grpc::ClientContext context;
  grpc::GenericStub stub(channel_);
  grpc::CompletionQueue queue;
  const auto watch = stub.PrepareCall(&context, "/grpc.health.v1.Health/Watch", &queue);
  const grpc::Slice all_services;
  grpc::ByteBuffer request(&all_services, 1), response;
  int step = 0;
  const auto next = [&] {
    void* tag;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  watch->StartCall(&step);
  ASSERT_TRUE(next());
  watch->WriteLast(request, grpc::WriteOptions(), &step);
  ASSERT_TRUE(next());
  watch->Read(&response, &step);
  ASSERT_TRUE(next());
  server_->Stop(absl::Hours(1));
  context.TryCancel();
  grpc::Status status;
  watch->Finish(&status, &step);
  next();
}

// Whatever is left of them is gone: the threads are idle, and stopping is quick.
TEST_F(GrpcFrontTest, ConnectionsThatAreResetAtOnce) {
  max_connections_ = 2;
  Start();
  for (int i = 0; i < 200; ++i) RawHttpClient(server_->port()).Reset();
  EXPECT_TRUE(Answers());
  server_->Stop(absl::Seconds(1));
}

// More than the sockets in between hold, in both directions.
TEST_F(GrpcFrontTest, LargeMessagesPassBothWays) {
  Start();
  v1::TokenizeRequest request;
  request.set_text(std::string(2'000'000, '~'));
  grpc::ClientContext contexts[2];
  v1::TokenizeResponse tokens;
  grpc::Status status = stub_->Tokenize(&contexts[0], request, &tokens);
  ASSERT_TRUE(status.ok()) << status.error_message();
  v1::DetokenizeRequest back;
  *back.mutable_token_ids() = {tokens.token_ids().begin() + 1, tokens.token_ids().end()};
  v1::DetokenizeResponse text;
  status = stub_->Detokenize(&contexts[1], back, &text);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(text.text() == request.text());
}

TEST_F(GrpcFrontTest, AClientThatTakesNothingIsCutOff) {
  front_options_.write_timeout = absl::Milliseconds(300);
  Start({.tokens_per_delta = 500, .step = absl::Milliseconds(5), .max_model_len = 1 << 21});
  RawHttpClient client(server_->port(), /*receive_buffer_bytes=*/4096);
  // Its windows are endless, and it does not read. What is asked for: a stream of a million tokens.
  const std::string settings("\0\0\6\4\0\0\0\0\0\0\4\x7F\xFF\xFF\xFF", 15);
  const std::string window("\0\0\4\x8\0\0\0\0\0\x7F\xFF\0\0", 13);
  const std::string path = "/cachalot.v1.Cachalot/Complete";
  const std::string headers =
      absl::StrCat("\x83\x86\x04", std::string(1, static_cast<char>(path.size())), path, "\x01\x01x",
                   std::string("\0\2te\x8trailers\x0f\x10\x10", 16), "application/grpc");
  const std::string message = TextRequest("Hello", 1 << 20).SerializeAsString();
  const auto frame = [](size_t size, char type, char flags) {
    return std::string{0, 0, static_cast<char>(size), type, flags, 0, 0, 0, 1};
  };
  client.Send(absl::StrCat(kPreface, settings, window, frame(headers.size(), 1, 4), headers,
                           frame(message.size() + 5, 0, 1), std::string(4, '\0'),
                           std::string(1, static_cast<char>(message.size())), message));
  EXPECT_TRUE(engine_->AwaitCancels(1, absl::Seconds(30)));
}

}  // namespace
}  // namespace cachalot
