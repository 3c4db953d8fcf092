// Router: prompts that begin alike go together, load evens out, and neither starves the other.
#include "engine/router.h"

#include <gtest/gtest.h>

#include <array>
#include <numeric>

namespace cachalot {
namespace {

std::vector<int32_t> Prompt(int prefix, int prefix_tokens, int end) {
  std::vector<int32_t> prompt(prefix_tokens, prefix);
  prompt.resize(prefix_tokens + 10, end);
  return prompt;
}

TEST(RouterTest, EvenRequestsSpreadEvenly) {
  Router router(4);
  std::array<int, 4> count = {};
  for (int i = 0; i < 40; ++i) ++count[router.Choose("", Prompt(i, 100, i)).rank];
  for (int n : count) EXPECT_EQ(n, 10);
}

TEST(RouterTest, OneRankTakesAll) {
  Router router(1);
  EXPECT_EQ(router.Choose("", Prompt(1, 1000, 1)).rank, 0);
}

TEST(RouterTest, WhatBeginsAlikeStaysTogetherUntilItsRankIsFull) {
  Router router(4);
  const Router::Route first = router.Choose("", Prompt(7, 4096, 0));
  EXPECT_EQ(first.tokens, 4106);
  router.HasBegun(first);
  int stayed = 0;
  std::array<int, 4> count = {};
  for (int i = 1; i <= 60; ++i) {
    const Router::Route route = router.Choose("", Prompt(7, 4096, i));
    router.HasBegun(route);
    ++count[route.rank];
    stayed += route.rank == first.rank && stayed == i - 1 ? 1 : 0;
  }
  // Another rank reads 4,106 tokens sooner than it waits behind sixteen requests; then that one has the prefix too.
  EXPECT_EQ(stayed, 15);
  for (int n : count) EXPECT_GT(n, 8);
}

TEST(RouterTest, AnotherSaltIsAnotherPrompt) {
  Router router(2);
  const Router::Route a = router.Choose("a", Prompt(7, 640, 0));
  EXPECT_EQ(router.Choose("b", Prompt(7, 640, 0)).tokens, 650);
  router.HasEnded(a, false);
  const Router::Route again = router.Choose("a", Prompt(7, 640, 0));
  EXPECT_EQ(again.rank, a.rank);
  EXPECT_EQ(again.tokens, 10);
  router.Forget();
  EXPECT_EQ(router.Choose("a", Prompt(7, 640, 0)).tokens, 650);
}

TEST(RouterTest, WhatHasEndedWeighsNothing) {
  Router router(2);
  const Router::Route first = router.Choose("", Prompt(1, 5000, 0)), second = router.Choose("", Prompt(2, 10, 0));
  EXPECT_NE(first.rank, second.rank);
  EXPECT_EQ(router.Choose("", Prompt(3, 10, 0)).rank, second.rank) << "the other has a long prompt to read";
  router.HasBegun(first);
  EXPECT_EQ(router.Choose("", Prompt(4, 10, 0)).rank, first.rank) << "which it has read";
  router.HasEnded(first, true);
  EXPECT_EQ(router.Choose("", Prompt(5, 10, 0)).rank, first.rank);
}

TEST(RouterTest, RemembersNoMoreThanItMay) {
  Router router(2);
  const Router::Route first = router.Choose("", Prompt(-1, 64, 0));
  router.HasEnded(first, false);
  for (int i = 0; i < 3; ++i) {  // each fills a generation
    std::vector<int32_t> prompt(Router::kMaxPrefixes / 2 * 64);
    std::iota(prompt.begin(), prompt.end(), i);
    router.HasEnded(router.Choose("", prompt), false);
  }
  EXPECT_EQ(router.Choose("", Prompt(-1, 64, 0)).tokens, 74);
}

}  // namespace
}  // namespace cachalot
