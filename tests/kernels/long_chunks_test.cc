// LongChunks: which sequences of a step they are, and that a step without any is like any other.
#include "kernels/long_chunks.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace cachalot {
namespace {

LongChunks Found(const std::vector<std::pair<int32_t, int32_t>>& sequences) {  // start, rows
  LongChunkFinder finder(100);
  for (const auto& [start, num_rows] : sequences) finder.Add(start, num_rows);
  return finder.found();
}

TEST(LongChunksTest, NoneIsNone) {
  EXPECT_EQ(Found({}), LongChunks());
  EXPECT_EQ(Found({{-1, 1}, {0, 99}, {-1, 4}}), LongChunks());
}

TEST(LongChunksTest, BehindOthers) {
  const LongChunks c = Found({{-1, 1}, {50, 7}, {0, 100}, {1000, 129}});
  EXPECT_EQ(c.min_rows, 100);
  EXPECT_EQ(c.first_row, 8);
  EXPECT_EQ(c.other_rows, 8);
  EXPECT_EQ(c.num_keys, 128 + 9 * 128) << "whole tiles of either";
}

TEST(LongChunksTest, BeforeOthers) {
  const LongChunks c = Found({{0, 128}, {-1, 1}, {3, 300}, {5, 60}});
  EXPECT_EQ(c.first_row, 0);
  EXPECT_EQ(c.other_rows, 489) << "up to the last row of the last one";
  EXPECT_EQ(c.num_keys, 128 + 3 * 128);
}

TEST(LongChunksTest, Alone) {
  const LongChunks c = Found({{0, 512}});
  EXPECT_EQ(c.other_rows, 0);
  EXPECT_NE(c, Found({{128, 512}})) << "what a step launches depends on its keys";
}

}  // namespace
}  // namespace cachalot
