// Http2Guard: what clients do passes, in any pieces; what only attacks do is cut.
#include "server/grpc/http2_guard.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace cachalot {
namespace {

enum Type : uint8_t { kData, kHeaders, kPriority, kReset, kSettings, kPushPromise, kPing, kGoAway, kWindowUpdate };
constexpr uint8_t kContinuation = 9, kUnknown = 0x55;
constexpr uint8_t kEndStream = 0x1, kAck = 0x1, kEndHeaders = 0x4;

std::string Frame(uint8_t type, uint8_t flags, uint32_t stream, size_t size) {
  std::string frame;
  for (const size_t part : {size >> 16, size >> 8, size, size_t{type}, size_t{flags}}) {
    frame.push_back(static_cast<char>(part & 0xFF));
  }
  for (const int shift : {24, 16, 8, 0}) frame.push_back(static_cast<char>(stream >> shift & 0xFF));
  return frame + std::string(size, 'x');
}

std::string Begin(bool acknowledged = true) {
  return "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Frame(kSettings, 0, 0, 12) +
         (acknowledged ? Frame(kSettings, kAck, 0, 0) : "");
}

std::string Call(uint32_t stream, size_t message = 40) {
  std::string call = Frame(kHeaders, kEndHeaders, stream, 100);
  for (; message > 16384; message -= 16384) call += Frame(kData, 0, stream, 16384);
  return call + Frame(kData, kEndStream, stream, message);
}

class Http2GuardTest : public testing::Test {
 protected:
  absl::Status Send(const std::string& bytes) { return guard_.OnReceived(bytes, now_); }
  // How many of these frames pass in a row.
  int CountUntilCut(const std::string& frame, int most) {
    for (int i = 0; i < most; ++i) {
      if (!Send(frame).ok()) return i;
    }
    return most;
  }

  absl::Time now_ = absl::UnixEpoch();
  Http2Guard guard_{now_};
};

TEST_F(Http2GuardTest, CallsPassInAnyPieces) {
  std::string bytes = Begin();
  for (uint32_t stream = 1; stream < 2000; stream += 2) bytes += Call(stream, stream * 50);
  bytes += Frame(kHeaders, 0, 2001, 16384) + Frame(kContinuation, kEndHeaders, 2001, 9000) +
           Frame(kData, kEndStream, 2001, 5) + Frame(kPing, 0, 0, 8) + Frame(kGoAway, 0, 0, 8);
  EXPECT_TRUE(Send(bytes).ok());
  for (const size_t size : {1, 7, 1000}) {
    Http2Guard guard(now_);
    for (size_t at = 0; at < bytes.size(); at += size) {
      ASSERT_TRUE(guard.OnReceived(std::string_view(bytes).substr(at, size), now_).ok()) << at;
    }
    EXPECT_TRUE(guard.has_begun());
  }
}

TEST_F(Http2GuardTest, HasBegunWithTheSettings) {
  const std::string begin = Begin();
  EXPECT_TRUE(Send(begin.substr(0, 32)).ok());
  EXPECT_FALSE(guard_.has_begun());
  EXPECT_TRUE(Send(begin.substr(32)).ok());
  EXPECT_TRUE(guard_.has_begun());
}

TEST_F(Http2GuardTest, WhatIsNoHttp2IsCut) {
  for (const std::string& bytes : {std::string("GET / HTTP/1.1\r\n"), std::string("\x16\x03\x01"),
                                   Begin().substr(0, 24) + Frame(kPing, 0, 0, 8)}) {
    EXPECT_EQ(Http2Guard(now_).OnReceived(bytes, now_).code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(Http2GuardTest, HeaderBlocksEnd) {
  const std::string open = Begin() + Frame(kHeaders, 0, 1, 100);
  EXPECT_TRUE(Send(open).ok());
  EXPECT_EQ(CountUntilCut(Frame(kContinuation, 0, 1, 16384), 100), 3);  // 64 KiB
  guard_ = Http2Guard(now_);
  EXPECT_TRUE(Send(open).ok());
  EXPECT_EQ(CountUntilCut(Frame(kContinuation, 0, 1, 0), 100), Http2Guard::kMaxContinuations);
  guard_ = Http2Guard(now_);
  EXPECT_FALSE(Send(open + Frame(kPing, 0, 0, 8)).ok());
  guard_ = Http2Guard(now_);
  EXPECT_FALSE(Send(Begin() + Frame(kContinuation, 0, 1, 0)).ok());
}

TEST_F(Http2GuardTest, FramesThatCarryNothingAreCut) {
  for (const uint8_t type :
       std::vector<uint8_t>{kSettings, kPing, kPriority, kWindowUpdate, kPushPromise, kGoAway, kUnknown, kData}) {
    guard_ = Http2Guard(now_);
    ASSERT_TRUE(Send(Begin() + Call(1)).ok());
    const std::string frame = Frame(type, 0, 1, type == kData ? 0 : 8);
    const int count = CountUntilCut(frame, 20'000);
    EXPECT_GT(count, type == kPing ? 400 : 8000) << int{type};
    EXPECT_LE(count, type == kPing ? 500 : 10'000) << int{type};
  }
  // The larger the fewer, and not without a limit.
  guard_ = Http2Guard(now_);
  ASSERT_TRUE(Send(Begin()).ok());
  EXPECT_LT(CountUntilCut(Frame(kSettings, 0, 0, 16384), 100), 50);
  guard_ = Http2Guard(now_);
  EXPECT_FALSE(Send(Begin() + Frame(kUnknown, 0, 0, 16385)).ok());
}

TEST_F(Http2GuardTest, ThatManyASecondPassForEver) {
  ASSERT_TRUE(Send(Begin() + Call(1)).ok());
  for (int second = 0; second < 100; ++second) {
    now_ += absl::Seconds(1);
    ASSERT_EQ(CountUntilCut(Frame(kWindowUpdate, 0, 1, 4), 900), 900);
    ASSERT_EQ(CountUntilCut(Frame(kReset, 0, 1, 4), 50), 50);
  }
}

// A client that reads a fast stream sends a WINDOW_UPDATE for each of its messages.
TEST_F(Http2GuardTest, AnswersEarnFrames) {
  ASSERT_TRUE(Send(Begin() + Call(1)).ok());
  for (int message = 0; message < 100'000; ++message) {
    guard_.OnSent(40);
    ASSERT_TRUE(Send(Frame(kWindowUpdate, 0, 1, 4)).ok()) << message;
  }
  // But the acknowledgement of a frame does not pay for the next.
  int count = 0;
  for (; count < 100'000 && Send(Frame(kPing, 0, 0, 8)).ok(); ++count) guard_.OnSent(17);
  EXPECT_LT(count, 30'000);
}

TEST_F(Http2GuardTest, ResetsAreCut) {
  ASSERT_TRUE(Send(Begin()).ok());
  int count = 0;
  for (uint32_t stream = 1; count < 5000; stream += 2, ++count) {
    if (!Send(Call(stream) + Frame(kReset, 0, stream, 4)).ok()) break;
  }
  EXPECT_EQ(count, 1000);
  EXPECT_EQ(guard_.TakeResets(), 1001);
  EXPECT_EQ(guard_.TakeResets(), 0);
}

TEST_F(Http2GuardTest, StreamsAreFewUntilTheSettingsAreAcknowledged) {
  ASSERT_TRUE(Send(Begin(/*acknowledged=*/false)).ok());
  uint32_t stream = 1;
  while (stream < 10'000 && Send(Call(stream)).ok()) stream += 2;
  EXPECT_EQ(stream / 2, Http2Guard::kMaxStreams);
}

TEST(ResetRateTest, ThoseWhoSpendMoreWait) {
  const absl::Time start = absl::UnixEpoch();
  ResetRate rate(start);
  EXPECT_EQ(rate.Spend(0, start), absl::ZeroDuration());
  EXPECT_EQ(rate.Spend(2000, start), absl::ZeroDuration());
  EXPECT_EQ(rate.Spend(1000, start), absl::Seconds(0.5));
  EXPECT_EQ(rate.Spend(1000, start), absl::Seconds(1));
  EXPECT_EQ(rate.Spend(0, start), absl::ZeroDuration());  // who resets nothing does not wait
  EXPECT_EQ(rate.Spend(500, start + absl::Seconds(1)), absl::Seconds(0.25));
  EXPECT_EQ(rate.Spend(2000, start + absl::Seconds(100)), absl::ZeroDuration());
}

}  // namespace
}  // namespace cachalot
