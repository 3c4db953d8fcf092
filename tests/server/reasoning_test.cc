// ReasoningSplitter: what is thought and what is answered, whatever the cuts.
#include "server/text/reasoning.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace cachalot {
namespace {

using Start = ReasoningStart;

ReasoningText Split(Start start, const std::vector<std::string>& pieces) {
  ReasoningSplitter splitter(start);
  ReasoningText out;
  for (const std::string& piece : pieces) splitter.Push(piece, &out);
  splitter.Flush(&out);
  if (out.takes_back) out.reasoning.clear();
  return out;
}

TEST(ReasoningTest, Rules) {
  const struct {
    Start start;
    std::string text, reasoning, content;
  } kCases[] = {
      {Start::kNever, "<think>a</think>b", "", "<think>a</think>b"},
      {Start::kNever, " \n<think>", "", " \n<think>"},
      {Start::kMayOpen, "", "", ""},
      {Start::kMayOpen, "hello", "", "hello"},
      {Start::kMayOpen, "  hello ", "", "  hello "},
      {Start::kMayOpen, " \n<thin", "", " \n<thin"},
      {Start::kMayOpen, "a</think>b", "a", "b"},
      {Start::kMayOpen, " \na\n</think>\n\nb</think>", "a", "b</think>"},
      {Start::kMayOpen, "a<think>b</think>c", "a<think>b", "c"},
      {Start::kMayOpen, "a\n<think>b", "", "a\n<think>b"},
      {Start::kMayOpen, "</think>b", "", "b"},
      {Start::kMayOpen, " </think> ", "", ""},
      {Start::kMayOpen, "a </thi", "", "a </thi"},
      {Start::kMayOpen, "<a> \n", "", "<a> \n"},
      {Start::kMayOpen, "<think>a</think>b", "a", "b"},
      {Start::kMayOpen, " \n<think>\n\na \n b\n</think>\n\nb\n", "a \n b", "b\n"},
      {Start::kMayOpen, "<think>\n\n</think>\n\nb", "", "b"},
      {Start::kMayOpen, "<think></think>", "", ""},
      {Start::kMayOpen, "<think>a</think>b</think>c<think>d", "a", "b</think>c<think>d"},
      {Start::kMayOpen, "<think>a<think>b</think>c", "a<think>b", "c"},
      {Start::kMayOpen, "<think>a < b </thin> </think >", "a < b </thin> </think >", ""},
      {Start::kMayOpen, "<think>a\n</thi", "a\n</thi", ""},
      {Start::kMayOpen, "<think>a \n", "a \n", ""},
      {Start::kOpen, "a</think>b", "a", "b"},
      {Start::kOpen, "\na\n</think>\n\nb", "a", "b"},
      {Start::kOpen, "<think>\na</think>b", "a", "b"},
      {Start::kOpen, "\n <think>a</think>b", "a", "b"},
      {Start::kOpen, "a<think>", "a<think>", ""},
      {Start::kOpen, " <thi", "<thi", ""},
      {Start::kOpen, " \n ", "", ""},
      {Start::kOpen, "</think>b", "", "b"},
      {Start::kOpen, " </think> ", "", ""},
      {Start::kOpen, "<<<//think></</think>b", "<<<//think></", "b"},
      {Start::kOpen, "é</think>é", "é", "é"},
  };
  std::mt19937 random(1);
  for (const auto& test : kCases) {
    for (int round = 0; round < 50; ++round) {
      std::vector<std::string> pieces;
      for (size_t at = 0; at < test.text.size(); at += pieces.back().size()) {
        pieces.push_back(test.text.substr(at, round == 0 ? std::string::npos : 1 + random() % (round < 10 ? 1 : 7)));
      }
      const ReasoningText out = Split(test.start, pieces);
      EXPECT_EQ(out.reasoning, test.reasoning) << test.text;
      EXPECT_EQ(out.content, test.content) << test.text;
    }
  }
}

TEST(ReasoningTest, HoldsBackNoMoreThanItMust) {
  ReasoningSplitter splitter(Start::kMayOpen);
  const auto push = [&splitter](std::string_view piece) {
    ReasoningText out;
    splitter.Push(piece, &out);
    return out.reasoning + "|" + out.content;
  };
  EXPECT_EQ(push(" <th"), "|");
  EXPECT_EQ(push("ink>a"), "a|");
  EXPECT_EQ(push("b "), "b|");
  EXPECT_EQ(push("c<"), " c|");
  EXPECT_EQ(push("/"), "|");
  EXPECT_EQ(push("x"), "</x|");
  EXPECT_EQ(push(" </think>\n"), "|");
  EXPECT_EQ(push("\nd \n"), "|d \n");
  EXPECT_EQ(push("</"), "|</");
}

// Text that may be either comes at once, as reasoning; what it was is known in the end.
TEST(ReasoningTest, WhatMayBeEitherDoesNotWait) {
  ReasoningSplitter thought(Start::kMayOpen), answered(Start::kMayOpen);
  for (ReasoningSplitter* splitter : {&thought, &answered}) {
    ReasoningText out;
    splitter->Push(" Yes", &out);
    EXPECT_EQ(out.reasoning, "Yes");
    splitter->Push(", it is", &out);
    EXPECT_EQ(out.reasoning, "Yes, it is");
    EXPECT_EQ(out.content, "");
    EXPECT_FALSE(out.takes_back);
  }
  ReasoningText out;
  answered.Flush(&out);
  EXPECT_TRUE(out.takes_back);
  EXPECT_EQ(out.content, " Yes, it is");
  out = {};
  thought.Push("\n</think>No", &out);
  thought.Flush(&out);
  EXPECT_FALSE(out.takes_back);
  EXPECT_EQ(out.content, "No");
  EXPECT_EQ(out.reasoning, "");
}

// A quadratic step would take minutes here.
TEST(ReasoningTest, LongRunsOfWhatIsHeld) {
  for (const Start start : {Start::kMayOpen, Start::kOpen}) {
    ReasoningSplitter splitter(start);
    ReasoningText out;
    splitter.Push("<think>a", &out);
    for (int i = 0; i < 1'000'000; ++i) splitter.Push("\n", &out);
    splitter.Push("b</think>c", &out);
    EXPECT_EQ(out.reasoning.size(), 1'000'002u);
    EXPECT_EQ(out.content, "c");
  }
}

}  // namespace
}  // namespace cachalot
