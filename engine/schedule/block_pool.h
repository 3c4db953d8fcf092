// BlockPool: which KV blocks are free, in use or idle, and what the full ones hold. Knows tokens and block ids, never
// sequences.
#ifndef CACHALOT_ENGINE_SCHEDULE_BLOCK_POOL_H_
#define CACHALOT_ENGINE_SCHEDULE_BLOCK_POOL_H_

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "kernels/ops_types.h"

namespace cachalot {

// 128 bits of a salt and of all tokens up to a block's end.
struct PrefixKey {
  uint64_t low = 0, high = 0;
  friend bool operator==(const PrefixKey&, const PrefixKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const PrefixKey& key) {
    return H::combine(std::move(h), key.low);
  }
};

// One thread: the step thread.
//
// A block that is full may be published: then whoever has the same tokens from the start on, and the same salt, may
// share it, at once and until it is evicted. A published block that nobody uses any more is idle: it counts as free,
// and is evicted when there is no other, the one used last last. Blocks are given back last first, so that of a prefix
// the end is evicted before the beginning, without which it could not be found. A hit is not taken on a hash's word:
// the block's tokens are compared, and it must follow the very block that was found before it.
class BlockPool {
 public:
  enum class PrefixCache { kOff, kOn };

  // `hash_seed` should be a secret: who knows it could look for prompts that share a hash, and so keep each other out.
  explicit BlockPool(int num_blocks, PrefixCache prefix_cache = PrefixCache::kOn, uint64_t hash_seed = 0);

  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  int num_free() const { return static_cast<int>(free_.size()) + num_idle_; }  // idle ones included
  int num_used() const { return num_blocks() - num_free(); }
  int num_idle() const { return num_idle_; }
  uint64_t num_evictions() const { return num_evictions_; }
  bool has_prefix_cache() const { return prefix_cache_ == PrefixCache::kOn; }
  int num_users(int32_t block) const { return blocks_[block].num_users; }

  // Appends `count` blocks to `blocks`, or does nothing and returns false when so many are not free.
  bool Allocate(int count, std::vector<int32_t>* blocks);

  // One user less of each, the last first; each must be in use.
  void Release(absl::Span<const int32_t> blocks);

  // ---- The prefix cache. `keys` belongs to one sequence of tokens and grows with it.

  // Adds the keys of those full blocks of `tokens` that have none yet.
  void ExtendKeys(std::string_view salt, absl::Span<const int32_t> tokens, std::vector<PrefixKey>* keys) const;

  // Names a publication of a block, and so all tokens up to that block's end; none other before or after it.
  using Serial = uint64_t;
  static constexpr Serial kNothing = 0, kRoot = 1;  // kRoot: of no tokens, before the first block

  // The published blocks, in order, that hold tokens[begin * P ..] after what `before` names; up to block `end` at
  // most. Nobody uses them for it yet.
  std::vector<int32_t> Find(absl::Span<const PrefixKey> keys, absl::Span<const int32_t> tokens, int begin, int end,
                            Serial before = kRoot) const;
  void Share(absl::Span<const int32_t> blocks);  // one user more of each
  Serial serial(int32_t block) const { return blocks_[block].serial; }

  // Counts the published blocks that came into use, by being published or shared. By no more than it grew has any
  // prefix more blocks in use than when it was looked up.
  uint64_t num_gains() const { return num_gains_; }

  // `block`, in use, holds the tokens of block `index`, after what `before` names, and will not be written to any more.
  // Whoever published the same before keeps the honour. Names what is published now; kNothing where nothing can be:
  // what is before it has been evicted, or another prompt has the same hash.
  Serial Publish(absl::Span<const PrefixKey> keys, absl::Span<const int32_t> tokens, int index, int32_t block,
                 Serial before);

  // Forgets what blocks hold: nothing is found until it is published anew.
  void ResetPrefixCache();

 private:
  struct Block {
    int num_users = 0;
    // Of published ones; others have no serial.
    Serial serial = kNothing, parent_serial = kNothing;
    int32_t parent = -1;   // the block before it, if still published as parent_serial
    int num_children = 0;  // published, with this as parent
    PrefixKey key;
    std::array<int32_t, kBlockTokens> tokens;
    int32_t older = -1, newer = -1;  // of idle ones
  };

  PrefixKey HashSalt(std::string_view salt) const;
  PrefixKey HashBlock(const PrefixKey& parent, const int32_t* tokens) const;
  int32_t FindOne(const PrefixKey& key, Serial parent_serial, const int32_t* tokens) const;
  int32_t EvictOne();
  void Unpublish(int32_t block);
  void AddIdle(int32_t block);
  void RemoveIdle(int32_t block);

  const PrefixCache prefix_cache_;
  std::array<uint64_t, 6> secrets_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_;  // a stack: the block given back last is warm and goes out first
  absl::flat_hash_map<PrefixKey, int32_t> published_;
  int32_t oldest_ = -1, newest_ = -1;  // idle
  int num_idle_ = 0;
  Serial next_serial_ = kRoot + 1;
  uint64_t num_evictions_ = 0, num_gains_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_BLOCK_POOL_H_
