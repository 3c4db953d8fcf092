// HttpServer over real sockets: requests in all shapes, limits, timeouts, streams, clients that leave or do not read.
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http/http_server.h"
#include "tests/server/raw_http_client.h"

namespace cachalot {
namespace {

HttpResponse PlainError(int status, std::string_view message) {
  return {.status = status, .content_type = "text/plain", .body = std::string(message), .headers = {}};
}

// Happens once; others wait for it.
class Event {
 public:
  void Notify() {
    std::lock_guard lock(mutex_);
    has_happened_ = true;
    happened_.notify_all();
  }
  bool Wait(std::chrono::milliseconds timeout = std::chrono::seconds(10)) {
    std::unique_lock lock(mutex_);
    return happened_.wait_for(lock, timeout, [this] { return has_happened_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable happened_;
  bool has_happened_ = false;
};

class HttpTest : public testing::Test {
 protected:
  HttpTest() { options_.port = 0; }

  void Start() {
    server_ = std::make_unique<HttpServer>(options_, PlainError);
    server_->Handle("POST", "/echo", [](HttpRequest request, std::shared_ptr<HttpResponder> responder) {
      responder->Respond({.content_type = "text/plain", .body = std::move(request.body), .headers = {}});
    });
    server_->Handle("GET", "/path/*", [](HttpRequest request, std::shared_ptr<HttpResponder> responder) {
      responder->Respond({.content_type = "", .body = absl::StrCat(request.path, "|", request.query), .headers = {}});
    });
    server_->Handle("GET", "/drop", [](HttpRequest, std::shared_ptr<HttpResponder>) {});
    server_->Handle("GET", "/hold", [this](HttpRequest, std::shared_ptr<HttpResponder> responder) {
      responder->OnDisconnect([this] { disconnected_.Notify(); });
      std::lock_guard lock(mutex_);
      held_ = std::move(responder);
      is_held_.notify_all();
    });
    ASSERT_TRUE(server_->Bind().ok());
    ASSERT_TRUE(server_->Start(max_connections_).ok());
  }
  void TearDown() override { held_ = nullptr; }

  // The responder of a request for /hold.
  std::shared_ptr<HttpResponder> Held() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(is_held_.wait_for(lock, std::chrono::seconds(10), [this] { return held_ != nullptr; }));
    return held_;
  }

  HttpOptions options_;
  int max_connections_ = 1000;
  std::unique_ptr<HttpServer> server_;
  std::mutex mutex_;
  std::condition_variable is_held_;
  std::shared_ptr<HttpResponder> held_;
  Event disconnected_;
};

TEST_F(HttpTest, KeepsConnectionsAlive) {
  Start();
  RawHttpClient client(server_->port());
  for (int i = 0; i < 3; ++i) {
    const ClientResponse response = client.Post("/echo", absl::StrCat("body ", i));
    EXPECT_EQ(response.status, 200);
    EXPECT_EQ(response.body, absl::StrCat("body ", i));
    EXPECT_EQ(response.headers.at("connection"), "keep-alive");
  }
}

TEST_F(HttpTest, AnswersPipelinedRequestsInOrder) {
  Start();
  RawHttpClient client(server_->port());
  std::string requests;
  for (int i = 0; i < 200; ++i) {
    requests += absl::StrCat("\r\nPOST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n", 100 + i);
  }
  client.Send(requests);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(client.ReadResponse().body, absl::StrCat(100 + i));
}

TEST_F(HttpTest, TakesRequestsByteByByteAndInChunks) {
  Start();
  RawHttpClient client(server_->port());
  const std::string request =
      "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1;ext=1\r\n,\r\n6\r\n "
      "world\r\n0\r\n\r\n";
  for (const char byte : request) ASSERT_TRUE(client.Send(std::string_view(&byte, 1)));
  EXPECT_EQ(client.ReadResponse().body, "hello, world");
  client.Send(request + request);
  EXPECT_EQ(client.ReadResponse().body, "hello, world");
  EXPECT_EQ(client.ReadResponse().body, "hello, world");
}

TEST_F(HttpTest, LargeBodiesBothWays) {
  Start();
  RawHttpClient client(server_->port());
  const std::string body(8 << 20, 'x');
  const ClientResponse response = client.Post("/echo", body);
  EXPECT_EQ(response.status, 200);
  EXPECT_TRUE(response.body == body);
}

TEST_F(HttpTest, HttpOneZeroAndConnectionCloseAreClosedAfterwards) {
  Start();
  for (const char* request :
       {"GET /path/a HTTP/1.0\r\n\r\n", "GET /path/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"}) {
    RawHttpClient client(server_->port());
    client.Send(request);
    const ClientResponse response = client.ReadResponse();
    EXPECT_EQ(response.body, "/path/a|");
    EXPECT_EQ(response.headers.at("connection"), "close");
    EXPECT_TRUE(client.IsClosedByServer());
  }
}

TEST_F(HttpTest, ContinuesWhenAsked) {
  Start();
  RawHttpClient client(server_->port());
  client.Send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.ReadResponse().status, 100);
  client.Send("hi");
  EXPECT_EQ(client.ReadResponse().body, "hi");
}

TEST_F(HttpTest, RoutesByPathAndMethod) {
  Start();
  RawHttpClient client(server_->port());
  EXPECT_EQ(client.Get("/path/a%20b/c?x=1&y").body, "/path/a b/c|x=1&y");
  EXPECT_EQ(client.Get("/path/").status, 404);
  EXPECT_EQ(client.Get("/nothing").status, 404);
  const ClientResponse response = client.Get("/echo");
  EXPECT_EQ(response.status, 405);
  EXPECT_EQ(response.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(client.Get("/drop").status, 500);
  client.Send("HEAD /path/a HTTP/1.1\r\nHost: x\r\n\r\n");
  const ClientResponse head = client.ReadResponse(/*is_head=*/true);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), "8");
  EXPECT_EQ(client.Get("/path/b").body, "/path/b|");
}

TEST_F(HttpTest, RefusesWhatIsNoHttp) {
  Start();
  for (const char* bytes :
       {"hello\r\n\r\n", "GET / HTTP/3.0\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03"
        "\x03\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"}) {
    RawHttpClient client(server_->port());
    client.Send(bytes);
    EXPECT_EQ(client.ReadResponse().status, 400) << bytes;
    EXPECT_TRUE(client.IsClosedByServer());
  }
}

TEST_F(HttpTest, LimitsHeadersAndBodies) {
  options_.max_header_bytes = 2000;
  options_.max_body_bytes = 10'000;
  Start();
  {
    RawHttpClient client(server_->port());
    client.Send(absl::StrCat("GET /path/a HTTP/1.1\r\nHost: x\r\nX: ", std::string(3000, 'x'), "\r\n\r\n"));
    EXPECT_EQ(client.ReadResponse().status, 431);
  }
  {
    RawHttpClient client(server_->port());
    client.Send(absl::StrCat("GET /", std::string(3000, 'x'), " HTTP/1.1\r\nHost: x\r\n\r\n"));
    EXPECT_EQ(client.ReadResponse().status, 431);
  }
  {
    // The answer arrives although the client goes on sending.
    RawHttpClient client(server_->port());
    client.SendPost("/echo", std::string(2 << 20, 'x'));
    EXPECT_EQ(client.ReadResponse().status, 413);
  }
  {
    RawHttpClient client(server_->port());
    client.Send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 5; ++i) client.Send(absl::StrCat("bb8\r\n", std::string(3000, 'x'), "\r\n"));
    EXPECT_EQ(client.ReadResponse().status, 413);
  }
  RawHttpClient client(server_->port());
  EXPECT_EQ(client.Post("/echo", std::string(10'000, 'x')).status, 200);
}

// Bodies that are being sent count, and those that handlers hold; small ones have a quarter to themselves.
TEST_F(HttpTest, LimitsBodiesInTotal) {
  options_.max_body_bytes = 1 << 20;
  options_.max_held_bytes = 2 << 20;
  Start();
  const auto begin = [this](size_t size) {
    auto client = std::make_unique<RawHttpClient>(server_->port());
    client->Send(absl::StrCat("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: ", size, "\r\n\r\n"));
    return client;
  };
  // Promises alone count for nothing.
  std::vector<std::unique_ptr<RawHttpClient>> promises;
  for (int i = 0; i < 10; ++i) promises.push_back(begin(1 << 20));
  RawHttpClient other(server_->port());
  EXPECT_EQ(other.Post("/echo", std::string(1 << 20, 'x')).status, 200);
  // Two of these would hold more than large bodies may: all but one are refused.
  for (auto& client : promises) client->Send(std::string((1 << 20) - 1, 'x'));
  std::vector<std::unique_ptr<RawHttpClient>> refused, held = std::move(promises);
  while (held.size() > 1) {
    for (auto& client : held) {
      if (client->HasBytesWithin(absl::Milliseconds(10))) refused.push_back(std::move(client));
    }
    std::erase(held, nullptr);
  }
  for (const auto& client : refused) {
    const ClientResponse response = client->ReadResponse();
    EXPECT_EQ(response.status, 503);
    EXPECT_EQ(response.headers.count("retry-after"), 1u);
  }
  EXPECT_EQ(other.Post("/echo", std::string(1000, 'x')).status, 200);
  // What was refused or is over counts no more.
  for (const auto& client : held) {
    client->Send("x");
    EXPECT_EQ(client->ReadResponse().status, 200);
  }
  EXPECT_EQ(other.Post("/echo", std::string(1 << 20, 'x')).status, 200);
}

TEST_F(HttpTest, ConnectionsThatAreTooManyWait) {
  max_connections_ = 2;
  Start();
  std::optional<RawHttpClient> clients[3];
  for (auto& client : clients) {
    client.emplace(server_->port());
    client->Send("GET /path/a HTTP/1.1\r\nHost: x\r\n\r\n");
  }
  for (int i = 0; i < 2; ++i) EXPECT_EQ(clients[i]->ReadResponse().status, 200);
  EXPECT_FALSE(clients[2]->HasBytesWithin(absl::Milliseconds(200)));
  clients[0].reset();
  EXPECT_EQ(clients[2]->ReadResponse().status, 200);
}

TEST_F(HttpTest, HalfSentRequestsTimeOut) {
  options_.header_timeout = absl::Milliseconds(200);
  options_.body_timeout = absl::Milliseconds(200);
  Start();
  for (const char* bytes : {"GET /pa", "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhel"}) {
    RawHttpClient client(server_->port());
    client.Send(bytes);
    EXPECT_EQ(client.ReadResponse().status, 408);
    EXPECT_TRUE(client.IsClosedByServer());
  }
}

// A byte now and then does not make the time longer.
TEST_F(HttpTest, SlowHeadersTimeOut) {
  options_.header_timeout = absl::Milliseconds(300);
  Start();
  RawHttpClient client(server_->port());
  const absl::Time start = absl::Now();
  std::thread sender([&client] {
    for (int i = 0; i < 100 && client.Send("G"); ++i) absl::SleepFor(absl::Milliseconds(20));
  });
  EXPECT_EQ(client.ReadResponse().status, 408);
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
  sender.join();
}

TEST_F(HttpTest, IdleConnectionsAreClosedSilently) {
  options_.idle_timeout = absl::Milliseconds(200);
  Start();
  RawHttpClient client(server_->port());
  EXPECT_EQ(client.Get("/path/a").status, 200);
  EXPECT_TRUE(client.IsClosedByServer());
}

TEST_F(HttpTest, StreamsInChunks) {
  Start();
  RawHttpClient client(server_->port());
  client.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  const auto responder = Held();
  responder->Begin({.content_type = "text/event-stream", .body = "", .headers = {{"Cache-Control", "no-cache"}}});
  ASSERT_TRUE(client.ReadUntil("\r\n\r\n"));  // the head comes before the first byte of the body
  EXPECT_NE(client.buffer().find("Transfer-Encoding: chunked"), std::string::npos);
  responder->Write("one ");
  ASSERT_TRUE(client.ReadUntil("4\r\none \r\n"));
  responder->Write("two");
  responder->End();
  responder->Write("late");
  const ClientResponse response = client.ReadResponse();
  EXPECT_EQ(response.body, "one two");
  EXPECT_EQ(response.headers.at("cache-control"), "no-cache");
  EXPECT_EQ(client.Get("/path/a").status, 200);  // the connection goes on
}

TEST_F(HttpTest, StreamsToHttpOneZeroWithoutChunks) {
  Start();
  RawHttpClient client(server_->port());
  client.Send("GET /hold HTTP/1.0\r\n\r\n");
  const auto responder = Held();
  responder->Begin({.body = "a", .headers = {}});
  responder->Write("b");
  responder->End();
  EXPECT_EQ(client.ReadResponse().body, "ab");
}

TEST_F(HttpTest, NoticesClientsThatLeave) {
  for (const bool is_reset : {false, true}) {
    Event gone;
    HttpServer server(options_, PlainError);
    Event arrived;
    std::shared_ptr<HttpResponder> held;
    server.Handle("GET", "/", [&](HttpRequest, std::shared_ptr<HttpResponder> responder) {
      responder->OnDisconnect([&gone] { gone.Notify(); });
      held = std::move(responder);
      arrived.Notify();
    });
    ASSERT_TRUE(server.Bind().ok());
    ASSERT_TRUE(server.Start(100).ok());
    RawHttpClient client(server.port());
    client.Send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    ASSERT_TRUE(arrived.Wait());
    EXPECT_FALSE(gone.Wait(std::chrono::milliseconds(50)));
    is_reset ? client.Reset() : client.Close();
    EXPECT_TRUE(gone.Wait());
    held->Respond({.body = "late", .headers = {}});
    held = nullptr;
    server.Stop(absl::ZeroDuration());
  }
}

TEST_F(HttpTest, AClientThatClosesItsSendingHalfStillGetsAnAnswer) {
  Start();
  RawHttpClient client(server_->port());
  client.Send("GET /path/a HTTP/1.1\r\nHost: x\r\n\r\nGET /path/b HTTP/1.1\r\nHost: x\r\n\r\n");
  client.CloseSendingHalf();
  EXPECT_EQ(client.ReadResponse().body, "/path/a|");
  EXPECT_EQ(client.ReadResponse().body, "/path/b|");
}

// Writers never wait for a client that does not read; it is cut off in the end.
TEST_F(HttpTest, SlowReadersAreCutOff) {
  options_.write_timeout = absl::Milliseconds(300);
  Start();
  RawHttpClient client(server_->port(), /*receive_buffer_bytes=*/4096);
  client.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  const auto responder = Held();
  responder->Begin({.body = "", .headers = {}});
  const absl::Time start = absl::Now();
  for (int i = 0; i < 1000; ++i) responder->Write(std::string(16 << 10, 'x'));
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  EXPECT_TRUE(disconnected_.Wait());
}

TEST_F(HttpTest, ReadersThatAreOnlySlowGetEverything) {
  options_.write_timeout = absl::Milliseconds(500);
  Start();
  RawHttpClient client(server_->port(), /*receive_buffer_bytes=*/32 << 10);
  client.Send("GET /hold HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const auto responder = Held();
  responder->Begin({.body = "", .headers = {}});
  for (int i = 0; i < 400; ++i) responder->Write(std::string(16 << 10, 'x'));
  responder->End();
  for (size_t i = 1; i <= 10; ++i) {  // longer than the timeout in all
    absl::SleepFor(absl::Milliseconds(100));
    client.ReadAtLeast(i * (512 << 10));
  }
  EXPECT_EQ(client.ReadResponse().body.size(), size_t{400} * (16 << 10));
}

// A body whose length is not known must not be taken for the next request, and one in a coding not for what was sent.
TEST_F(HttpTest, RefusesUnknownTransferCodings) {
  Start();
  for (const char* coding : {"gzip", "xchunked", "identity", "gzip, chunked", "chunked, chunked", "chunked, gzip", "",
                             "gzip\r\nTransfer-Encoding: chunked"}) {
    RawHttpClient client(server_->port());
    client.Send(absl::StrCat("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: ", coding,
                             "\r\n\r\nGET /path/a HTTP/1.1\r\nHost: x\r\n\r\n"));
    EXPECT_EQ(client.ReadResponse().status, 501) << coding;
    EXPECT_EQ(client.ReadResponse().status, 0) << coding;  // closed
  }
}

TEST_F(HttpTest, RefusesContentCodings) {
  Start();
  const auto status_of = [this](std::string_view header, std::string_view body) {
    RawHttpClient client(server_->port());
    client.Send(absl::StrCat("POST /echo HTTP/1.1\r\nHost: x\r\n", std::string(header), std::string(body)));
    return client.ReadResponse().status;
  };
  constexpr char kPlain[] = "Content-Length: 2\r\n\r\nhi", kChunked[] = "Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n";
  for (const char* body : {kPlain, kChunked}) {
    EXPECT_EQ(status_of("Content-Encoding: gzip\r\n", body), 415);
    EXPECT_EQ(status_of("Content-Encoding: identity, br\r\n", body), 415);
    EXPECT_EQ(status_of("Content-Encoding: identity\r\nContent-Encoding: zstd\r\n", body), 415);
    EXPECT_EQ(status_of("Content-Encoding: Identity\r\n", body), 200);
    EXPECT_EQ(status_of("", body), 200);
  }
  // Of a client that asks first, nothing is taken.
  EXPECT_EQ(status_of("Content-Encoding: gzip\r\nExpect: 100-continue\r\n", "Content-Length: 2\r\n\r\n"), 415);
}

TEST_F(HttpTest, WantsOneHost) {
  Start();
  const std::pair<const char*, int> kCases[] = {
      {"1.1\r\n", 400},
      {"1.1\r\nHost: a\r\nHost: b\r\n", 400},
      {"1.1\r\nHost: a\r\nX: y\r\nhost: a\r\n", 400},
      {"1.0\r\nHost: a\r\nHost: a\r\n", 400},
      {"1.1\r\nHost: a\r\n", 200},
      {"1.1\r\nHost:\r\n", 200},
      {"1.0\r\n", 200},
  };
  for (const auto& [head, status] : kCases) {
    RawHttpClient client(server_->port());
    client.Send(absl::StrCat("GET /path/a HTTP/", head, "\r\n"));
    EXPECT_EQ(client.ReadResponse().status, status) << head;
    if (status == 400) {
      EXPECT_TRUE(client.IsClosedByServer()) << head;
    }
  }
}

TEST_F(HttpTest, TellsMethods) {
  Start();
  RawHttpClient client(server_->port());
  for (const auto& [target, allow] :
       {std::pair("/echo", "POST, OPTIONS"), std::pair("/path/a", "GET, HEAD, OPTIONS")}) {
    client.Send(absl::StrCat("OPTIONS ", target, " HTTP/1.1\r\nHost: x\r\n\r\n"));
    const ClientResponse response = client.ReadResponse();
    EXPECT_EQ(response.status, 200);
    EXPECT_EQ(response.headers.at("allow"), allow);
    EXPECT_EQ(response.headers.at("content-length"), "0");
  }
  client.Send("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\nOPTIONS /nothing HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.ReadResponse().status, 200);
  EXPECT_EQ(client.ReadResponse().status, 404);
}

TEST_F(HttpTest, TakesAbsoluteTargets) {
  Start();
  RawHttpClient client(server_->port());
  client.Send("GET http://host:1/path/a?b HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(client.ReadResponse().body, "/path/a|b");
}

// What a writer sees of a client that does not read: a backlog, which is gone once it has read.
TEST_F(HttpTest, TellsItsBacklog) {
  Start();
  RawHttpClient client(server_->port(), /*receive_buffer_bytes=*/4096);
  client.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  const auto responder = Held();
  responder->Write("early ");  // joins what Begin starts
  responder->Begin({.body = "", .headers = {}});
  size_t written = 6;
  while (responder->Backlog() < (1 << 20) && written < (64 << 20)) {
    responder->Write(std::string(16 << 10, 'x'));
    written += 16 << 10;
  }
  EXPECT_GE(responder->Backlog(), size_t{1 << 20});
  client.ReadAtLeast(written);
  EXPECT_LT(responder->Backlog(), size_t{1 << 20});
  responder->End();
  EXPECT_EQ(responder->Backlog(), 0u);
  EXPECT_EQ(client.ReadResponse().body.size(), written);
}

TEST_F(HttpTest, TellsAPortThatIsTaken) {
  Start();
  HttpOptions options;
  options.port = server_->port();
  HttpServer second(options, PlainError);
  const absl::Status status = second.Bind();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find(absl::StrCat(options.port)), absl::string_view::npos);
}

TEST_F(HttpTest, StopsAfterTheAnswersInProgress) {
  Start();
  RawHttpClient idle(server_->port()), busy(server_->port());
  EXPECT_EQ(idle.Get("/path/a").status, 200);
  busy.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  std::shared_ptr<HttpResponder> responder = Held();
  responder->Begin({.body = "begun ", .headers = {}});
  std::thread stopper([this] { server_->Stop(absl::Seconds(10)); });
  EXPECT_TRUE(idle.IsClosedByServer());
  responder->Write("ended");
  responder->End();
  EXPECT_EQ(busy.ReadResponse().body, "begun ended");
  EXPECT_TRUE(busy.IsClosedByServer());
  busy.Close();
  responder = nullptr;
  held_ = nullptr;
  stopper.join();
}

// One that was answered and stays is not waited for: neither when that was long ago nor when it happens now.
TEST_F(HttpTest, StopsWithoutThoseThatWereAnswered) {
  Start();
  RawHttpClient done(server_->port()), busy(server_->port());
  done.Send("GET /path/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(done.ReadResponse().status, 200);
  busy.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  const std::shared_ptr<HttpResponder> responder = Held();
  std::thread stopper([this] { server_->Stop(absl::Hours(1)); });
  responder->Respond({.body = "held", .headers = {}});
  EXPECT_EQ(busy.ReadResponse().body, "held");
  stopper.join();
}

TEST_F(HttpTest, StopDoesNotWaitForever) {
  Start();
  RawHttpClient client(server_->port());
  client.Send("GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  Held();
  const absl::Time start = absl::Now();
  server_->Stop(absl::Milliseconds(200));
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  EXPECT_TRUE(client.IsClosedByServer());
}

// Many connections and threads at once, for the sanitizers.
TEST_F(HttpTest, ManyClients) {
  options_.num_threads = 4;
  Start();
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this, i] {
      for (int round = 0; round < 20; ++round) {
        RawHttpClient client(server_->port());
        for (int k = 0; k < 5; ++k) EXPECT_EQ(client.Post("/echo", absl::StrCat(i, k)).body, absl::StrCat(i, k));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace cachalot
