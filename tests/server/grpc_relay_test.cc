// GrpcFront before an echo instead of gRPC: every byte arrives, whatever clients and servers do; for the sanitizers,
// too.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/grpc/grpc_front.h"
#include "tests/server/raw_http_client.h"

namespace cachalot {
namespace {

// Preface, settings, and data in frames of 16 KiB.
std::string Request(size_t num_frames, char fill) {
  std::string request("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
  request.append("\0\0\0\4\0\0\0\0\0", 9);
  for (size_t i = 0; i < num_frames; ++i) {
    request.append("\0\x40\0\0\0\0\0\0\1", 9).append(16384, fill);
  }
  return request;
}

class GrpcRelayTest : public testing::Test {
 protected:
  ~GrpcRelayTest() override {
    front_.Stop(absl::ZeroDuration());
    for (std::thread& thread : threads_) thread.join();
  }

  void Start(int max_connections = 100) {
    ASSERT_TRUE(front_.Bind().ok());
    ASSERT_TRUE(front_
                    .Start(max_connections,
                           [this](int fd) {
                             std::lock_guard lock(mutex_);
                             threads_.emplace_back([this, fd] { Echo(fd); });
                           })
                    .ok());
  }
  // gRPC's end: gives back what comes, and ends when the client does.
  void Echo(int fd) {
    std::vector<char> bytes(100'000);
    while (true) {
      pollfd ready = {.fd = fd, .events = POLLIN, .revents = 0};
      poll(&ready, 1, -1);
      const ssize_t size = recv(fd, bytes.data(), bytes.size(), 0);
      if (size < 0 && errno == EAGAIN) continue;
      if (size <= 0 || !SendAll(fd, bytes.data(), size)) break;
    }
    close(fd);
  }
  static bool SendAll(int fd, const char* data, ssize_t size) {
    while (size > 0) {
      pollfd ready = {.fd = fd, .events = POLLOUT, .revents = 0};
      poll(&ready, 1, -1);
      const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN) return false;
      if (sent > 0) data += sent, size -= sent;
    }
    return true;
  }

  GrpcFront front_{{}};
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

TEST_F(GrpcRelayTest, EveryByteArrives) {
  Start();
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([this, i] {
      const std::string request = Request(200, static_cast<char>('a' + i));
      RawHttpClient client(front_.port(), i % 2 == 0 ? 4096 : 0);
      std::thread sender([&] { EXPECT_TRUE(client.Send(request)); });
      client.ReadAtLeast(request.size());
      sender.join();
      EXPECT_TRUE(client.buffer() == request);
    });
  }
  for (std::thread& client : clients) client.join();
}

// The end of what a client sends is passed on, and what comes after it still comes back.
TEST_F(GrpcRelayTest, AClientThatEndsFirst) {
  Start();
  RawHttpClient client(front_.port());
  const std::string request = Request(3, 'x');
  client.Send(request);
  client.CloseSendingHalf();
  client.ReadAtLeast(request.size() + 1);  // until the end
  EXPECT_TRUE(client.buffer() == request);
}

TEST_F(GrpcRelayTest, ClientsThatGoAtAnyMoment) {
  Start(/*max_connections=*/4);
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([this, i] {
      for (int round = 0; round < 20; ++round) {
        RawHttpClient client(front_.port());
        const std::string request = Request(1 + round % 4, 'x');
        client.Send(std::string_view(request).substr(0, request.size() - round % 3 * 40));
        if (round % 2 == 0) client.ReadAtLeast(request.size() / 2);
        (i + round) % 3 == 0 ? client.Reset() : client.Close();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  RawHttpClient last(front_.port());
  last.Send(Request(1, 'x'));
  EXPECT_TRUE(last.ReadUntil("xxx"));
}

TEST_F(GrpcRelayTest, StopsWithClientsThere) {
  Start();
  RawHttpClient silent(front_.port()), talking(front_.port());
  talking.Send(Request(1, 'x'));
  EXPECT_TRUE(talking.ReadUntil("xxx"));
  front_.Stop(absl::Milliseconds(10));
  EXPECT_FALSE(silent.ReadUntil("never"));
  EXPECT_FALSE(talking.ReadUntil("never"));
}

}  // namespace
}  // namespace cachalot
