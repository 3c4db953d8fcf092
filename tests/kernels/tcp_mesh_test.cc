// TCP meshes among ranks that die, fall silent or speak another language, and among strangers.
#include "kernels/tcp_mesh.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/kernels/loopback.h"

namespace cachalot {
namespace {

using tcp_mesh::Header;
using tcp_mesh::Hello;
using tcp_mesh::Kind;
using testing::HasSubstr;

absl::Time Late() { return absl::Now() + absl::Minutes(1); }

template <typename T>
std::string_view BytesOf(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

// Rank 0 of two; rank 1 is the test.
struct Pair {
  explicit Pair(absl::Duration silence = absl::Seconds(30)) {
    auto listener = Socket::Listen("127.0.0.1:0");
    EXPECT_TRUE(listener.ok()) << listener.status();
    address = listener->local_address();
    options.nodes = {address, "127.0.0.1:9"};
    options.heartbeat = absl::Milliseconds(50);
    options.silence = silence;
    options.session.fill('s');
    thread = std::thread([this, listener = *std::move(listener)] {
      auto meshes = ConnectTcpMeshes(listener, options, Late());
      ASSERT_TRUE(meshes.ok()) << meshes.status();
      mesh = std::move((*meshes)[0][0]);
    });
  }
  ~Pair() {
    if (thread.joinable()) thread.join();
  }
  Hello HelloOf(int mesh, int from, int to) const {
    Hello hello;
    hello.mesh = mesh;
    hello.from = from;
    hello.to = to;
    hello.session = options.session;
    return hello;
  }
  Hello GoodHello() const { return HelloOf(0, 1, 0); }
  // A connection that has said `hello`.
  Socket Connect(const Hello& hello) {
    auto socket = Socket::Connect(address, Late());
    EXPECT_TRUE(socket.ok()) << socket.status();
    EXPECT_TRUE(socket->Send(BytesOf(hello), Late()).ok());
    return *std::move(socket);
  }
  Socket Join() {
    Socket socket = Connect(GoodHello());
    thread.join();
    EXPECT_TRUE(socket.Send(BytesOf(Header{}), Late()).ok());
    return socket;
  }

  std::string address;
  TcpMeshOptions options;
  std::unique_ptr<Mesh> mesh;
  std::thread thread;
};

// Until the next that is no heartbeat.
std::pair<Kind, std::string> NextMessage(const Socket& socket) {
  Header header;
  do {
    if (!socket.Receive(reinterpret_cast<char*>(&header), sizeof(header), Late()).ok()) return {Kind::kHeartbeat, ""};
  } while (header.kind == Kind::kHeartbeat);
  std::string body(header.length, ' ');
  EXPECT_TRUE(socket.Receive(body.data(), body.size(), Late()).ok());
  return {header.kind, body};
}

constexpr size_t kLength = 64'000'000;

TEST(TcpMesh, CarriesLongMessagesBothWays) {
  auto ranks = MakeLoopbackMesh({.num_nodes = 2});
  std::vector<std::thread> threads;
  for (auto& mesh : ranks) {
    threads.emplace_back([&mesh = *mesh] {
      for (int round = 0; round < 3; ++round) {
        for (int r = 0; r < 2; ++r) mesh.outbox(r).assign(kLength, static_cast<char>(10 * round + mesh.rank()));
        const auto came = mesh.Exchange();
        ASSERT_TRUE(came.ok()) << came.status();
        for (int r = 0; r < 2; ++r) {
          ASSERT_EQ((*came)[r].size(), kLength);
          for (size_t i = 0; i < kLength; i += 4099) ASSERT_EQ((*came)[r][i], static_cast<char>(10 * round + r));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(TcpMesh, SeveralAreApart) {
  auto listener = Socket::Listen("127.0.0.1:0");
  ASSERT_TRUE(listener.ok());
  TcpMeshOptions options;
  options.nodes = {listener->local_address()};
  options.ranks_per_node = options.num_meshes = 2;
  auto meshes = ConnectTcpMeshes(*listener, options, Late());
  ASSERT_TRUE(meshes.ok()) << meshes.status();
  (*meshes)[0][0]->Abort(absl::AbortedError("no more"));
  EXPECT_EQ((*meshes)[0][1]->Exchange().status(), absl::AbortedError("no more"));
  std::thread other([&] { EXPECT_TRUE((*meshes)[1][0]->Exchange().ok()); });
  EXPECT_TRUE((*meshes)[1][1]->Exchange().ok());
  other.join();
}

TEST(TcpMesh, AConnectionThatCloses) {
  for (const bool is_waiting : {true, false}) {
    Pair pair;
    Socket socket = pair.Join();
    std::atomic<int> num_told = 0;
    pair.mesh->OnAwaited([&](uint64_t num_begun) { num_told += num_begun == 0 ? 1 : 0; });
    std::thread waiting;
    const auto exchange = [&] {
      EXPECT_EQ(pair.mesh->Exchange().status(), absl::AbortedError("rank 1 (127.0.0.1:9) has closed its connection"));
    };
    if (is_waiting) {
      waiting = std::thread(exchange);
      EXPECT_EQ(NextMessage(socket).first, Kind::kRows);
    }
    ASSERT_TRUE(socket.Send(BytesOf(Header{Kind::kRows, 0, 100}), Late()).ok());  // half a message
    ASSERT_TRUE(socket.Send("half", Late()).ok());
    shutdown(socket.fd(), SHUT_WR);
    EXPECT_EQ(NextMessage(socket).first, Kind::kAbort);
    if (is_waiting) waiting.join();
    exchange();
    EXPECT_EQ(num_told, 1);
  }
}

TEST(TcpMesh, ARankThatFallsSilent) {
  Pair pair(absl::Milliseconds(300));
  Socket socket = pair.Join();
  EXPECT_EQ(pair.mesh->Exchange().status(), absl::AbortedError("rank 1 (127.0.0.1:9) has not been heard of for 300ms"));
  EXPECT_EQ(NextMessage(socket).first, Kind::kRows);
  const auto [kind, text] = NextMessage(socket);
  EXPECT_EQ(kind, Kind::kAbort);
  EXPECT_THAT(text, HasSubstr("rank 1 (127.0.0.1:9) has not been heard of"));
}

// A message so long that it never leaves, as nobody reads it.
TEST(TcpMesh, ARankThatReadsNothing) {
  Pair pair(absl::Milliseconds(300));
  Socket socket = pair.Join();
  pair.mesh->outbox(1).assign(64'000'000, 'x');
  EXPECT_THAT(std::string(pair.mesh->Exchange().status().message()), HasSubstr("has not been heard of for 300ms"));
  pair.mesh->outbox(1).assign(10, 'y');
  pair.mesh.reset();  // does not wait for it either
}

TEST(TcpMesh, RanksThatAreIdleAreNotSilent) {
  auto ranks = MakeLoopbackMesh({.num_nodes = 2, .heartbeat = absl::Milliseconds(50), .silence = absl::Seconds(2)});
  absl::SleepFor(absl::Seconds(3));
  std::thread other([&] { EXPECT_TRUE(ranks[1]->Exchange().ok()); });
  EXPECT_TRUE(ranks[0]->Exchange().ok());
  other.join();
}

TEST(TcpMesh, ARankThatHasLeft) {
  auto ranks = MakeLoopbackMesh({.num_nodes = 3});
  std::atomic<int> num_told = 0;
  ranks[2]->OnAwaited([&](uint64_t num_begun) { num_told += num_begun == 0 ? 1 : 0; });
  ranks[1].reset();
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(num_told, 0);  // nobody needs it
  const absl::Status status = ranks[0]->Exchange().status();
  EXPECT_THAT(std::string(status.message()), testing::AllOf(HasSubstr("rank 1 (127.0.0.1:"), HasSubstr(") has left")));
  EXPECT_EQ(ranks[2]->Exchange().status(), status);
}

TEST(TcpMesh, WhatIsNoMessage) {
  const Header too_long = {Kind::kRows, 0, tcp_mesh::kMaxRows + 1}, unknown = {static_cast<Kind>(0x20544547), 0, 1};
  const Header empty_reason = {Kind::kAbort}, long_leave = {Kind::kLeave, 0, 1};
  for (const Header& header : {too_long, unknown, empty_reason, long_leave}) {
    Pair pair;
    Socket socket = pair.Join();
    ASSERT_TRUE(socket.Send(BytesOf(header), Late()).ok());
    EXPECT_THAT(std::string(pair.mesh->Exchange().status().message()),
                HasSubstr("rank 1 (127.0.0.1:9) speaks another language"));
  }
  Pair pair;  // more rounds than there can be
  Socket socket = pair.Join();
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(socket.Send(BytesOf(Header{Kind::kRows}), Late()).ok());
  while (NextMessage(socket).first != Kind::kHeartbeat) continue;
  EXPECT_THAT(std::string(pair.mesh->Exchange().status().message()), HasSubstr("speaks another language"));
}

TEST(TcpMesh, StrangersAreShownOut) {
  Pair pair;
  std::vector<Socket> strangers;
  Hello hello = pair.GoodHello();
  hello.magic[0] = 'C';
  strangers.push_back(pair.Connect(hello));
  hello = pair.GoodHello();
  hello.session[31] = 'z';
  strangers.push_back(pair.Connect(hello));
  for (const auto& [mesh, from, to] : {std::tuple{1, 1, 0}, {-1, 1, 0}, {0, 2, 0}, {0, 0, 0}, {0, 1, 1}, {0, 1, -1}}) {
    strangers.push_back(pair.Connect(pair.HelloOf(mesh, from, to)));
  }
  auto silent = Socket::Connect(pair.address, Late());
  ASSERT_TRUE(silent.ok());
  auto closing = Socket::Connect(pair.address, Late());
  ASSERT_TRUE(closing.ok());
  *closing = Socket();
  const Socket friendly = pair.Join();
  char byte;
  for (const Socket& stranger : strangers) EXPECT_TRUE(absl::IsUnavailable(stranger.Receive(&byte, 1, Late())));
  ASSERT_TRUE(friendly.Send(BytesOf(Header{Kind::kRows, 0, 3}), Late()).ok());
  ASSERT_TRUE(friendly.Send("yes", Late()).ok());
  const auto came = pair.mesh->Exchange();
  ASSERT_TRUE(came.ok()) << came.status();
  EXPECT_EQ(std::string((*came)[1].data(), (*came)[1].size()), "yes");
}

TEST(TcpMesh, RanksThatDoNotCome) {
  auto listener = Socket::Listen("127.0.0.1:0"), other = Socket::Listen("127.0.0.1:0");
  ASSERT_TRUE(listener.ok() && other.ok());
  TcpMeshOptions options;
  options.nodes = {listener->local_address(), other->local_address()};
  const auto deadline = [] { return absl::Now() + absl::Milliseconds(100); };
  EXPECT_EQ(ConnectTcpMeshes(*listener, options, deadline()).status(),
            absl::DeadlineExceededError("node 0: 1 connections of other ranks are missing"));
  options.node = 1;
  *listener = Socket();
  EXPECT_EQ(ConnectTcpMeshes(*other, options, deadline()).status(),
            absl::UnavailableError(absl::StrCat("cannot connect to ", options.nodes[0], ": Connection refused")));
}

}  // namespace
}  // namespace cachalot
