// BlockPool: blocks in use and free, what is found in the prefix cache, and what is evicted.
#include "engine/schedule/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace cachalot {
namespace {

TEST(BlockPool, GivesAllOrNothing) {
  BlockPool pool(4);
  std::vector<int32_t> blocks;
  EXPECT_TRUE(pool.Allocate(3, &blocks));
  EXPECT_FALSE(pool.Allocate(2, &blocks));
  EXPECT_EQ(blocks.size(), 3u);
  EXPECT_EQ(pool.num_free(), 1);
  pool.Release(blocks);
  EXPECT_EQ(pool.num_used(), 0);
}

// Tokens of `num_blocks` full blocks, the first `num_same` blocks the same for all, and one token more.
std::vector<int32_t> TokensOf(int num_blocks, int num_same, int32_t own) {
  std::vector<int32_t> tokens;
  for (int i = 0; i <= num_blocks * kBlockTokens; ++i) tokens.push_back(i < num_same * kBlockTokens ? i : own);
  return tokens;
}

struct Cached {
  std::vector<int32_t> tokens, blocks;
  std::vector<PrefixKey> keys;
};

// Takes blocks for all of `tokens`, the cached ones first, and publishes the full ones.
Cached Fill(BlockPool& pool, const std::vector<int32_t>& tokens, const std::string& salt = "") {
  Cached c;
  c.tokens = tokens;
  const int num_full = static_cast<int>(tokens.size()) / kBlockTokens;
  pool.ExtendKeys(salt, tokens, &c.keys);
  c.blocks = pool.Find(c.keys, tokens, 0, num_full);
  pool.Share(c.blocks);
  const int num_found = static_cast<int>(c.blocks.size());
  EXPECT_TRUE(pool.Allocate(num_full - num_found, &c.blocks));
  BlockPool::Serial before = num_found == 0 ? BlockPool::kRoot : pool.serial(c.blocks[num_found - 1]);
  for (int i = num_found; i < num_full && !c.keys.empty() && before != BlockPool::kNothing; ++i) {
    before = pool.Publish(c.keys, tokens, i, c.blocks[i], before);
  }
  return c;
}

int NumFound(const BlockPool& pool, const std::vector<int32_t>& tokens, const std::string& salt = "") {
  std::vector<PrefixKey> keys;
  pool.ExtendKeys(salt, tokens, &keys);
  return static_cast<int>(pool.Find(keys, tokens, 0, static_cast<int>(keys.size())).size());
}

TEST(PrefixCache, FindsWhatBeginsTheSameOfTheSameSalt) {
  BlockPool pool(16);
  const Cached first = Fill(pool, TokensOf(3, 3, 0));
  EXPECT_EQ(NumFound(pool, TokensOf(3, 3, 0)), 3) << "found while in use";
  EXPECT_EQ(NumFound(pool, TokensOf(3, 2, 7)), 2);
  EXPECT_EQ(NumFound(pool, TokensOf(3, 0, 7)), 0);
  EXPECT_EQ(NumFound(pool, TokensOf(3, 3, 0), "tenant"), 0);
  std::vector<int32_t> shifted(first.tokens.begin() + kBlockTokens, first.tokens.end());
  EXPECT_EQ(NumFound(pool, shifted), 0) << "the same block after another beginning";
  const Cached second = Fill(pool, TokensOf(4, 2, 7)), other = Fill(pool, TokensOf(3, 3, 0), "tenant");
  EXPECT_EQ(second.blocks[1], first.blocks[1]);
  EXPECT_EQ(pool.num_used(), 3 + 2 + 3);
  EXPECT_EQ(NumFound(pool, TokensOf(3, 3, 0), "tenant"), 3);
  for (const char* salt : {"tenanu", "uenant", "tenant ", "tenan"}) {
    EXPECT_EQ(NumFound(pool, TokensOf(3, 3, 0), salt), 0) << salt;
  }
  for (const Cached& c : {first, second, other}) pool.Release(c.blocks);
  EXPECT_EQ(pool.num_used(), 0);
  EXPECT_EQ(pool.num_idle(), 8);
  EXPECT_EQ(pool.num_free(), 16);
  EXPECT_EQ(NumFound(pool, TokensOf(4, 2, 7)), 4);
  pool.ResetPrefixCache();
  EXPECT_EQ(NumFound(pool, TokensOf(4, 2, 7)), 0);
  EXPECT_EQ(pool.num_idle(), 0);
  EXPECT_EQ(pool.num_free(), 16);
}

TEST(PrefixCache, EvictsTheOldestFromTheEnd) {
  BlockPool pool(8);
  const Cached a = Fill(pool, TokensOf(3, 1, 1)), b = Fill(pool, TokensOf(4, 1, 2));
  pool.Release(a.blocks);
  pool.Release(b.blocks);
  std::vector<int32_t> taken;
  ASSERT_TRUE(pool.Allocate(3, &taken));
  EXPECT_EQ(pool.num_evictions(), 1u) << "two were free";
  EXPECT_EQ(NumFound(pool, a.tokens), 2);
  EXPECT_EQ(NumFound(pool, b.tokens), 4);
  pool.Share(pool.Find(a.keys, a.tokens, 0, 2));  // used again: now the other is the oldest
  pool.Release({a.blocks.data(), 2});
  ASSERT_TRUE(pool.Allocate(3, &taken));
  EXPECT_EQ(NumFound(pool, a.tokens), 2);
  EXPECT_EQ(NumFound(pool, b.tokens), 1);
  ASSERT_TRUE(pool.Allocate(2, &taken));
  EXPECT_EQ(NumFound(pool, a.tokens), 0);
  EXPECT_EQ(pool.num_evictions(), 6u);
  EXPECT_FALSE(pool.Allocate(1, &taken));
}

// Whoever was told how many blocks of a prefix are in use need not ask again before so many have come into use.
TEST(PrefixCache, CountsWhatComesIntoUse) {
  BlockPool pool(8);
  const Cached a = Fill(pool, TokensOf(3, 3, 0));
  EXPECT_EQ(pool.num_gains(), 3u);
  const Cached b = Fill(pool, TokensOf(4, 3, 1));
  EXPECT_EQ(pool.num_gains(), 4u) << "three were in use already";
  pool.Release(a.blocks);
  EXPECT_EQ(pool.num_gains(), 4u);
  pool.Release(b.blocks);
  std::vector<int32_t> unpublished;
  ASSERT_TRUE(pool.Allocate(4, &unpublished));
  pool.Release(unpublished);
  EXPECT_EQ(pool.num_gains(), 4u);
  pool.Share({b.blocks.data(), 2});
  EXPECT_EQ(pool.num_gains(), 6u);
}

// Two compute the same at the same time: the second's blocks are its own, what follows is found all the same, and its
// beginning outlives it although nobody uses that.
TEST(PrefixCache, ABeginningThatIsFollowedIsEvictedLast) {
  BlockPool pool(7);
  Cached a = Fill(pool, TokensOf(2, 2, 0)), b;
  b.tokens = TokensOf(4, 2, 5);
  pool.ExtendKeys("", b.tokens, &b.keys);
  ASSERT_TRUE(pool.Allocate(4, &b.blocks));
  BlockPool::Serial before = BlockPool::kRoot;
  for (int i = 0; i < 4; ++i) before = pool.Publish(b.keys, b.tokens, i, b.blocks[i], before);
  EXPECT_EQ(NumFound(pool, b.tokens), 4);
  pool.Release(a.blocks);
  EXPECT_EQ(pool.num_idle(), 2);
  pool.Release(b.blocks);
  EXPECT_EQ(pool.num_idle(), 4);
  std::vector<int32_t> taken;
  ASSERT_TRUE(pool.Allocate(4, &taken));
  EXPECT_EQ(pool.num_evictions(), 1u);
  EXPECT_EQ(NumFound(pool, b.tokens), 3);
}

// What the pool makes of hash seed 0. Who knows it can write tokens that undo all that came before them.
std::vector<int32_t> TokensThatUndo() {
  uint64_t state = 0, secrets[4];
  for (uint64_t& secret : secrets) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    secret = (z ^ z >> 31) | 1;
  }
  std::vector<int32_t> tokens(4);
  std::memcpy(&tokens[0], &secrets[3], 8);
  std::memcpy(&tokens[2], &secrets[2], 8);
  return tokens;
}

TEST(PrefixCache, TwoPromptsOfOneHashAreTold) {
  BlockPool pool(16, BlockPool::PrefixCache::kOn, 0);
  const std::vector<int32_t> undo = TokensThatUndo();
  // The hashes meet at the end of the first block, or at the beginning of the second.
  for (const int at : {kBlockTokens - 4, kBlockTokens}) {
    std::vector<int32_t> one = TokensOf(2, 0, 5), other = TokensOf(2, 0, 5);
    std::copy(undo.begin(), undo.end(), one.begin() + at);
    std::copy(undo.begin(), undo.end(), other.begin() + at);
    other[3] = 6;
    std::vector<PrefixKey> other_keys;
    pool.ExtendKeys("", other, &other_keys);
    const Cached cached = Fill(pool, one);
    ASSERT_TRUE(cached.keys[1] == other_keys[1]) << "no collision: this tests nothing";
    EXPECT_EQ(NumFound(pool, one), 2);
    EXPECT_EQ(NumFound(pool, other), 0);
    const Cached both = Fill(pool, other);
    EXPECT_EQ(NumFound(pool, one), 2) << "who was first stays";
    EXPECT_EQ(NumFound(pool, other), at / kBlockTokens);
    // What follows the other is not found after the first.
    std::vector<int32_t> longer = other, mixed = one;
    longer.insert(longer.end(), kBlockTokens, 9);
    mixed.insert(mixed.end(), kBlockTokens, 9);
    const Cached third = Fill(pool, longer);
    EXPECT_EQ(NumFound(pool, mixed), 2);
    pool.Release(third.blocks);
    pool.Release(both.blocks);
    pool.Release(cached.blocks);
    pool.ResetPrefixCache();
  }
}

TEST(PrefixCache, OffFindsNothing) {
  BlockPool pool(8, BlockPool::PrefixCache::kOff);
  const Cached a = Fill(pool, TokensOf(3, 3, 0));
  EXPECT_EQ(NumFound(pool, a.tokens), 0);
  pool.Release(a.blocks);
  EXPECT_EQ(pool.num_idle(), 0);
}

TEST(BlockPoolDeathTest, ADoubleFreeIsABug) {
  BlockPool pool(4);
  std::vector<int32_t> blocks;
  ASSERT_TRUE(pool.Allocate(1, &blocks));
  pool.Release(blocks);
  EXPECT_DEATH(pool.Release(blocks), "");
}

}  // namespace
}  // namespace cachalot
