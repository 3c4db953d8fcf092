// BlockPool: a stack of free block ids, a table of published ones, a list of idle ones by age.
#include "engine/schedule/block_pool.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"

namespace cachalot {
namespace {

// Both halves of the product: every bit of the result depends on every bit of x and y.
uint64_t Fold(uint64_t x, uint64_t y) {
  const unsigned __int128 product = static_cast<unsigned __int128>(x) * y;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t SplitMix(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

}  // namespace

BlockPool::BlockPool(int num_blocks, PrefixCache prefix_cache, uint64_t hash_seed)
    : prefix_cache_(prefix_cache), blocks_(num_blocks) {
  for (uint64_t& secret : secrets_) secret = SplitMix(&hash_seed) | 1;
  free_.reserve(num_blocks);
  for (int b = num_blocks; b-- > 0;) free_.push_back(b);
}

// ---- Blocks ----

bool BlockPool::Allocate(int count, std::vector<int32_t>* blocks) {
  if (count > num_free()) return false;
  for (int i = 0; i < count; ++i) {
    int32_t block;
    if (free_.empty()) {
      block = EvictOne();
    } else {
      block = free_.back();
      free_.pop_back();
    }
    blocks_[block].num_users = 1;
    blocks->push_back(block);
  }
  return true;
}

void BlockPool::Release(absl::Span<const int32_t> blocks) {
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) {
    const int32_t block = *it;
    CHECK(block >= 0 && block < num_blocks() && blocks_[block].num_users > 0, "block {} is not in use", block);
    if (--blocks_[block].num_users > 0) continue;
    if (blocks_[block].serial != kNothing) {
      AddIdle(block);
    } else {
      free_.push_back(block);
    }
  }
}

// The oldest idle one that no published block follows. One that is followed, by a block of somebody who computed this
// prefix at the same time, gets a second turn.
int32_t BlockPool::EvictOne() {
  for (int i = 0; i < num_idle_ && blocks_[oldest_].num_children > 0; ++i) {
    const int32_t block = oldest_;
    RemoveIdle(block);
    AddIdle(block);
  }
  const int32_t block = oldest_;
  RemoveIdle(block);
  Unpublish(block);
  ++num_evictions_;
  return block;
}

void BlockPool::AddIdle(int32_t block) {
  blocks_[block].older = newest_;
  blocks_[block].newer = -1;
  (newest_ >= 0 ? blocks_[newest_].newer : oldest_) = block;
  newest_ = block;
  ++num_idle_;
}

void BlockPool::RemoveIdle(int32_t block) {
  const auto [older, newer] = std::pair(blocks_[block].older, blocks_[block].newer);
  (older >= 0 ? blocks_[older].newer : oldest_) = newer;
  (newer >= 0 ? blocks_[newer].older : newest_) = older;
  --num_idle_;
}

// ---- The prefix cache ----

PrefixKey BlockPool::HashSalt(std::string_view salt) const {
  uint64_t a = secrets_[4] ^ salt.size(), b = secrets_[5];
  for (size_t i = 0; i < salt.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, salt.data() + i, std::min<size_t>(8, salt.size() - i));
    a = Fold(a ^ word, secrets_[0]);
    b = Fold(b ^ word, secrets_[1]);
  }
  return {Fold(a ^ secrets_[2], b ^ secrets_[3]), Fold(b ^ secrets_[4], a ^ secrets_[5])};
}

PrefixKey BlockPool::HashBlock(const PrefixKey& parent, const int32_t* tokens) const {
  uint64_t a = parent.low ^ secrets_[0], b = parent.high ^ secrets_[1];
  for (int i = 0; i < kBlockTokens; i += 4) {
    uint64_t first, second;
    std::memcpy(&first, tokens + i, 8);
    std::memcpy(&second, tokens + i + 2, 8);
    a = Fold(a ^ first, second ^ secrets_[2]);
    b = Fold(b ^ second, first ^ secrets_[3]);
  }
  return {Fold(a ^ secrets_[2], b ^ secrets_[3]), Fold(b ^ secrets_[4], a ^ secrets_[5])};
}

void BlockPool::ExtendKeys(std::string_view salt, absl::Span<const int32_t> tokens,
                           std::vector<PrefixKey>* keys) const {
  if (!has_prefix_cache()) return;
  const size_t num_full = tokens.size() / kBlockTokens;
  if (keys->size() >= num_full) return;
  PrefixKey key = keys->empty() ? HashSalt(salt) : keys->back();
  for (size_t i = keys->size(); i < num_full; ++i) {
    key = HashBlock(key, tokens.data() + i * kBlockTokens);
    keys->push_back(key);
  }
}

int32_t BlockPool::FindOne(const PrefixKey& key, Serial parent_serial, const int32_t* tokens) const {
  const auto it = published_.find(key);
  if (it == published_.end()) return -1;
  const Block& block = blocks_[it->second];
  const bool is_same =
      block.parent_serial == parent_serial && std::memcmp(block.tokens.data(), tokens, sizeof(block.tokens)) == 0;
  return is_same ? it->second : -1;
}

std::vector<int32_t> BlockPool::Find(absl::Span<const PrefixKey> keys, absl::Span<const int32_t> tokens, int begin,
                                     int end, Serial before) const {
  std::vector<int32_t> found;
  for (int i = begin; i < std::min(end, static_cast<int>(keys.size())); ++i) {
    const int32_t block = FindOne(keys[i], before, tokens.data() + static_cast<size_t>(i) * kBlockTokens);
    if (block < 0) break;
    before = blocks_[block].serial;
    found.push_back(block);
  }
  return found;
}

void BlockPool::Share(absl::Span<const int32_t> blocks) {
  for (int32_t block : blocks) {
    if (blocks_[block].num_users++ > 0) continue;
    RemoveIdle(block);
    ++num_gains_;
  }
}

BlockPool::Serial BlockPool::Publish(absl::Span<const PrefixKey> keys, absl::Span<const int32_t> tokens, int index,
                                     int32_t block, Serial before) {
  Block& b = blocks_[block];
  CHECK(b.num_users > 0 && b.serial == kNothing, "block {} is not to be published", block);
  int32_t parent = -1;
  if (index > 0) {
    const auto it = published_.find(keys[index - 1]);
    if (it == published_.end() || blocks_[it->second].serial != before) return kNothing;
    parent = it->second;
  }
  const int32_t* own = tokens.data() + static_cast<size_t>(index) * kBlockTokens;
  if (const int32_t same = FindOne(keys[index], before, own); same >= 0) return blocks_[same].serial;
  if (const auto it = published_.find(keys[index]); it != published_.end()) {
    const int32_t other = it->second;
    const Block& o = blocks_[other];
    if (o.parent < 0 || blocks_[o.parent].serial == o.parent_serial) return kNothing;
    // One whose beginning was evicted: nobody could find it any more.
    if (o.num_users == 0) {
      RemoveIdle(other);
      free_.push_back(other);
    }
    Unpublish(other);
  }
  b.serial = next_serial_++;
  b.parent = parent;
  b.parent_serial = before;
  b.num_children = 0;
  b.key = keys[index];
  std::copy_n(own, kBlockTokens, b.tokens.begin());
  published_[b.key] = block;
  ++num_gains_;
  if (parent >= 0) ++blocks_[parent].num_children;
  return b.serial;
}

void BlockPool::Unpublish(int32_t block) {
  Block& b = blocks_[block];
  published_.erase(b.key);
  if (b.parent >= 0 && blocks_[b.parent].serial == b.parent_serial) --blocks_[b.parent].num_children;
  b.serial = kNothing;
}

void BlockPool::ResetPrefixCache() {
  while (oldest_ >= 0) {
    const int32_t block = oldest_;
    RemoveIdle(block);
    free_.push_back(block);
  }
  for (Block& block : blocks_) block.serial = kNothing;
  published_.clear();
}

}  // namespace cachalot
