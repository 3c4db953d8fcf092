// The client against our own server: addresses, bodies as they come, giving up, and servers that break off.
#include "server/http/http_client.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "server/http/http_server.h"

namespace cachalot {
namespace {

TEST(HttpClientTest, Addresses) {
  for (const char* url : {"http://h", "http://h:1", "http://h:1/", "http://[::1]:80/v1"}) {
    EXPECT_TRUE(HttpClient::Create(url).ok()) << url;
  }
  for (const char* url : {"", "h:1", "https://h", "http://", "http://:80", "http://h:", "http://h:x"}) {
    EXPECT_EQ(HttpClient::Create(url).status().code(), absl::StatusCode::kInvalidArgument) << url;
  }
}

class HttpClientToServerTest : public testing::Test {
 protected:
  HttpClientToServerTest()
      : server_({.port = 0}, [](int status, std::string_view message) {
          return HttpResponse{.status = status, .body = std::string(message), .headers = {}};
        }) {
    server_.Handle("GET", "/base/hello", [](HttpRequest, std::shared_ptr<HttpResponder> responder) {
      responder->Respond({.body = "hello", .headers = {}});
    });
    server_.Handle("POST", "/stream", [](HttpRequest request, std::shared_ptr<HttpResponder> responder) {
      responder->Begin({.body = "", .headers = {}});
      for (int i = 0; i < 100; ++i) responder->Write(request.body);
      responder->End();
    });
    server_.Handle("POST", "/hold", [this](HttpRequest, std::shared_ptr<HttpResponder> responder) {
      responder->Begin({.body = "begun", .headers = {}});
      std::lock_guard lock(mutex_);
      held_ = std::move(responder);
    });
    EXPECT_TRUE(server_.Bind().ok());
    EXPECT_TRUE(server_.Start(100).ok());
  }
  HttpClient Client(const std::string& path = "") {
    return *HttpClient::Create(absl::StrCat("http://127.0.0.1:", server_.port(), path));
  }

  HttpServer server_;
  std::mutex mutex_;
  std::shared_ptr<HttpResponder> held_;
};

TEST_F(HttpClientToServerTest, GetsBelowAPrefix) {
  const auto response = Client("/base/").Get("/hello");
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->status, 200);
  EXPECT_EQ(response->body, "hello");
  EXPECT_EQ(Client().Get("/nothing")->status, 404);
}

TEST_F(HttpClientToServerTest, TellsTheBodyAsItComes) {
  std::string told;
  const auto on_body = [&told](int status, std::string_view more) {
    EXPECT_EQ(status, 200);
    told += more;
    return true;
  };
  const auto response = Client().Post("/stream", "0123456789", on_body, nullptr);
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->body.size(), 1000u);
  EXPECT_EQ(told, response->body);
}

TEST_F(HttpClientToServerTest, CanBeGivenUp) {
  std::atomic<bool> has_begun = false;
  const auto response = Client().Post(
      "/hold", "x",
      [&](int, std::string_view) {
        has_begun = true;
        return true;
      },
      [&] { return has_begun.load(); });
  EXPECT_TRUE(absl::IsCancelled(response.status())) << response.status();
  const auto refused = Client().Post(
      "/hold", "x", [](int, std::string_view) { return false; }, nullptr);
  EXPECT_TRUE(absl::IsCancelled(refused.status())) << refused.status();
}

TEST_F(HttpClientToServerTest, SaysWhenTheServerBreaksOff) {
  const auto response = Client().Post(
      "/hold", "x",
      [this](int, std::string_view) {
        std::lock_guard lock(mutex_);
        held_ = nullptr;  // dropped: the connection is closed within the answer
        return true;
      },
      nullptr);
  EXPECT_TRUE(absl::IsUnavailable(response.status())) << response.status();
}

TEST(HttpClientTest, SaysWhenThereIsNoServer) {
  const auto response = HttpClient::Create("http://127.0.0.1:1")->Get("/");
  EXPECT_TRUE(absl::IsUnavailable(response.status()));
  EXPECT_NE(response.status().message().find("127.0.0.1:1"), absl::string_view::npos);
}

}  // namespace
}  // namespace cachalot
