// The join: nodes that fit, that do not, that come twice or go again, and peers that are neither node nor leader.
#include "engine/join.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "absl/time/clock.h"

namespace cachalot {
namespace {

using testing::HasSubstr;

absl::Time Late() { return absl::Now() + absl::Minutes(1); }

std::string FreeAddress() {
  auto listener = Socket::Listen("127.0.0.1:0");
  EXPECT_TRUE(listener.ok()) << listener.status();
  return listener->local_address();
}

JoinOptions Options(const std::string& leader, int num_nodes, int node) {
  JoinOptions options;
  options.num_nodes = num_nodes;
  options.node = node;
  options.leader = leader;
  options.secret = "of the sea";
  options.timeout = absl::Minutes(1);
  options.facts = {{"build", "1"}, {"max-sequences", "64"}};
  return options;
}

std::string Message(std::string text, uint32_t length) {
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + std::move(text);
}

// Of one that connects to the leader and says `text`.
Socket Stranger(const std::string& leader, const std::string& text) {
  while (true) {
    auto socket = Socket::Connect(leader, Late());
    if (!socket.ok()) continue;  // it does not listen yet
    EXPECT_TRUE(socket->Send(text, Late()).ok());
    return *std::move(socket);
  }
}

TEST(Join, AllGetTheSameTable) {
  const std::string leader = FreeAddress();
  std::vector<absl::StatusOr<JoinedNodes>> joined(4);
  std::vector<std::thread> nodes;
  for (int node = 0; node < 4; ++node) {
    nodes.emplace_back([&, node] { joined[node] = JoinNodes(Options(leader, 4, node)); });
  }
  for (std::thread& node : nodes) node.join();
  for (int node = 0; node < 4; ++node) {
    ASSERT_TRUE(joined[node].ok()) << joined[node].status();
    EXPECT_EQ(joined[node]->nodes, joined[0]->nodes);
    EXPECT_EQ(joined[node]->session, joined[0]->session);
    EXPECT_EQ(joined[node]->listener.local_address(), joined[node]->nodes[node]);
  }
  EXPECT_NE(joined[0]->session, MeshSession());
}

TEST(Join, TheLeaderOutlastsWhoDoesNotFit) {
  const std::string leader = FreeAddress();
  absl::StatusOr<JoinedNodes> led;
  std::thread leading([&] { led = JoinNodes(Options(leader, 3, 0)); });
  std::vector<Socket> strangers;
  for (const std::string& text :
       {std::string("GET / HTTP/1.1\r\n\r\n"), Message("", 0), Message("short", 5), Message(std::string(40, '\n'), 40),
        Message(std::string(31, 'x') + "\0", 32), Message("", 0xffffffff)}) {
    strangers.push_back(Stranger(leader, text));
  }
  JoinOptions options = Options(leader, 3, 1);
  options.facts[1].second = "32";
  EXPECT_EQ(JoinNodes(options).status(), absl::InvalidArgumentError("node 1: max-sequences is 32, the leader's is 64"));
  options.facts[1].first = "max-whales";
  EXPECT_EQ(JoinNodes(options).status(), absl::InvalidArgumentError("node 1: it is of another build"));
  options.facts.pop_back();
  EXPECT_EQ(JoinNodes(options).status(), absl::InvalidArgumentError("node 1: it is of another build"));
  options = Options(leader, 3, 7);
  EXPECT_EQ(JoinNodes(options).status(), absl::InvalidArgumentError("node 7: node-rank is not one of 1 to 2"));
  options = Options(leader, 3, 1);
  options.secret = "of the sky";
  EXPECT_TRUE(absl::IsPermissionDenied(JoinNodes(options).status()));

  absl::StatusOr<JoinedNodes> first, second;
  options = Options(leader, 3, 1);
  options.timeout = absl::Milliseconds(500);  // and goes again
  EXPECT_TRUE(absl::IsDeadlineExceeded(JoinNodes(options).status()));
  std::thread joining([&] { first = JoinNodes(Options(leader, 3, 1)); });
  std::thread last([&] { second = JoinNodes(Options(leader, 3, 2)); });
  joining.join();
  last.join();
  leading.join();
  ASSERT_TRUE(led.ok()) << led.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(led->session, second->session);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(led->nodes, first->nodes);
}

TEST(Join, WhatListensIsNoLeader) {
  for (const std::string& text : {Message("hello", 5), Message("", 0), std::string("SSH-2.0-OpenSSH_9.2p1 Debian\r\n"),
                                  Message("cachalot-join-1", 15)}) {
    auto listener = Socket::Listen("127.0.0.1:0");
    ASSERT_TRUE(listener.ok());
    JoinOptions options = Options(listener->local_address(), 2, 1);
    options.timeout = absl::Milliseconds(300);
    std::thread answering([&] {
      auto socket = listener->Accept(Late());
      ASSERT_TRUE(socket.ok());
      EXPECT_TRUE(socket->Send(text, Late()).ok());
      socket->Send(Message("of course", 9), Late()).IgnoreError();  // no proof in it; it may have left by now
      char byte;
      while (socket->Receive(&byte, 1, Late()).ok()) continue;
    });
    const absl::Status status = JoinNodes(options).status();
    EXPECT_TRUE(absl::IsDeadlineExceeded(status) || absl::IsPermissionDenied(status)) << status;
    answering.join();
  }
}

TEST(Join, WaitsNoLongerThanItIsTold) {
  JoinOptions options = Options(FreeAddress(), 3, 0);
  options.timeout = absl::Milliseconds(100);
  EXPECT_EQ(JoinNodes(options).status(),
            absl::DeadlineExceededError("2 of 3 nodes have not joined within 100ms: 1, 2"));
  options.node = 1;
  EXPECT_THAT(std::string(JoinNodes(options).status().message()),
              HasSubstr("node 1 has not joined at " + options.leader + " within 100ms: cannot connect to"));
  auto taken = Socket::Listen(options.leader);
  options.node = 0;
  EXPECT_THAT(std::string(JoinNodes(options).status().message()), HasSubstr("cannot listen on"));
}

}  // namespace
}  // namespace cachalot
