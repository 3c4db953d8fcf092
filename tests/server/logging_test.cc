// Log lines as JSON: always valid, fields apart from the message. The queue: in order, and never in the way.
#include "server/logging.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "server/log_queue.h"

namespace cachalot {
namespace {

using nlohmann::json;

TEST(LoggingTest, FieldsBecomeKeys) {
  EXPECT_EQ(json::parse(JsonLogLine("T", "info", "ended: a=b\tn=12\tseconds=0.5\tname=x y\tquoted=\"a\\tb\"\tempty=")),
            json::parse(R"({"time":"T","level":"info","message":"ended: a=b","n":12,"seconds":0.5,"name":"x y",
                            "quoted":"a\tb","empty":""})"));
}

TEST(LoggingTest, WhateverIsLoggedIsValidJson) {
  for (const std::string message : {"\"quotes\" \\ and\nlines", "bytes \xff\xfe", "", "\t", "a\t=\tb=", "x\ty={"}) {
    const json line = json::parse(JsonLogLine("T", "error", message), nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(line.is_object() && line.contains("message")) << message;
  }
}

// A pipe and a queue that writes to it.
class LogQueueTest : public testing::Test {
 protected:
  LogQueueTest() {
    EXPECT_EQ(pipe(ends_), 0);
    queue_ = std::make_shared<LogQueue>(ends_[1], std::make_unique<spdlog::pattern_formatter>("%v"));
    logger_ = std::make_unique<spdlog::logger>("test", queue_);
  }
  ~LogQueueTest() override {
    Stop();
    close(ends_[0]);
  }
  void Stop() {
    logger_ = nullptr;
    if (std::exchange(queue_, nullptr) != nullptr) close(ends_[1]);
  }
  // What comes out of the pipe until its end, or `count` lines.
  std::vector<std::string> ReadLines(size_t count = SIZE_MAX) {
    std::vector<std::string> lines;
    while (lines.size() < count) {
      if (const size_t end = read_.find('\n'); end != std::string::npos) {
        lines.push_back(read_.substr(0, end));
        read_.erase(0, end + 1);
        continue;
      }
      char bytes[4096];
      const ssize_t size = read(ends_[0], bytes, sizeof(bytes));
      if (size <= 0) break;
      read_.append(bytes, size);
    }
    return lines;
  }

  int ends_[2];
  std::string read_;  // and not yet told
  std::shared_ptr<LogQueue> queue_;
  std::unique_ptr<spdlog::logger> logger_;
};

TEST_F(LogQueueTest, WritesInOrderAndAtTheEnd) {
  for (int i = 0; i < 100; ++i) logger_->info("{}", i);
  logger_->info("{}", std::string(10'000, 'x'));
  logger_->flush();
  logger_->info("last");
  Stop();
  const std::vector<std::string> lines = ReadLines();
  ASSERT_EQ(lines.size(), 102u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(lines[i], std::to_string(i));
  EXPECT_EQ(lines[100].size(), 10'000u);
  EXPECT_EQ(lines[101], "last");
}

// Nobody reads: whoever logs goes on all the same, and so does whoever ends.
TEST_F(LogQueueTest, APipeThatNobodyReads) {
  const std::string text(1000, 'x');
  for (int i = 0; i < 5000; ++i) logger_->info("{} {}", i, text);
  const uint64_t dropped = queue_->num_dropped();
  EXPECT_GT(dropped, 3000u);
  EXPECT_LT(dropped, 4900u);
  logger_->flush();
  // There is room again: what was kept comes, and how many were not, perhaps in parts.
  uint64_t num_kept = 0, num_mentioned = 0;
  while (num_kept < 5000 - dropped || num_mentioned < dropped) {
    const std::string line = ReadLines(1).at(0);
    const size_t equals = line.find("\tdropped=");
    if (equals == std::string::npos) {
      ++num_kept;
    } else {
      num_mentioned += std::stoul(line.substr(equals + 9));
    }
  }
  EXPECT_EQ(num_kept, 5000 - dropped);
  EXPECT_EQ(num_mentioned, dropped);
  for (int i = 0; i < 500; ++i) logger_->info("{}", text);
  Stop();  // ends although it cannot write it all
}

TEST_F(LogQueueTest, APipeThatWasClosed) {
  signal(SIGPIPE, SIG_IGN);
  close(std::exchange(ends_[0], -1));
  for (int i = 0; i < 1000; ++i) logger_->info("{}", i);
  logger_->flush();
  Stop();
}

}  // namespace
}  // namespace cachalot
