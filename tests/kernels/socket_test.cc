// Sockets: addresses, deadlines, and what is said of an end that is not there.
#include "kernels/socket.h"

#include <gtest/gtest.h>

#include <thread>

#include "absl/time/clock.h"

namespace cachalot {
namespace {

absl::Time Soon() { return absl::Now() + absl::Milliseconds(20); }
absl::Time Late() { return absl::Now() + absl::Minutes(1); }

TEST(Socket, AddressesAreSplitAndJoined) {
  using Parts = std::pair<std::string, std::string>;
  EXPECT_EQ(*SplitAddress("leader.svc:29500"), Parts("leader.svc", "29500"));
  EXPECT_EQ(*SplitAddress("[::1]:0"), Parts("::1", "0"));
  EXPECT_EQ(JoinAddress("::1", "7"), "[::1]:7");
  EXPECT_EQ(JoinAddress("10.0.0.1", "7"), "10.0.0.1:7");
  for (const char* bad : {"", "host", ":80", "host:", "host:port", "host:65536", "host:-1", "::1:80", "[]:80"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(SplitAddress(bad).status())) << bad;
  }
}

TEST(Socket, GivesAllThatWasSentOrSaysWhyNot) {
  auto listener = Socket::Listen("127.0.0.1:0");
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(listener->Accept(Soon()).status()));
  auto near = Socket::Connect(listener->local_address(), Late());
  ASSERT_TRUE(near.ok()) << near.status();
  auto far = listener->Accept(Late());
  ASSERT_TRUE(far.ok()) << far.status();
  EXPECT_EQ(near->peer_address(), listener->local_address());
  EXPECT_EQ(near->local_address(), far->peer_address());

  const std::string text(20'000'000, 'x');
  std::thread sending([&] { EXPECT_TRUE(near->Send(text, Late()).ok()); });
  std::string got(text.size(), ' ');
  EXPECT_TRUE(far->Receive(got.data(), got.size(), Late()).ok());
  sending.join();
  EXPECT_EQ(got, text);

  EXPECT_TRUE(absl::IsDeadlineExceeded(far->Receive(got.data(), 1, Soon())));
  EXPECT_TRUE(absl::IsDeadlineExceeded(near->Send(text + text, Soon())));  // nobody reads
  *near = Socket();
  EXPECT_TRUE(absl::IsUnavailable(far->Send(text, Late())));
}

TEST(Socket, NamesWhatCannotBe) {
  auto listener = Socket::Listen("127.0.0.1:0");
  ASSERT_TRUE(listener.ok());
  const std::string address = listener->local_address();
  EXPECT_EQ(Socket::Listen(address).status().message(), "cannot listen on " + address + ": Address already in use");
  *listener = Socket();
  EXPECT_EQ(Socket::Connect(address, Late()).status().message(),
            "cannot connect to " + address + ": Connection refused");
  EXPECT_TRUE(absl::IsUnavailable(Socket::Connect("no-such-host.invalid:80", Late()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Socket::Connect("nowhere", Late()).status()));
}

}  // namespace
}  // namespace cachalot
