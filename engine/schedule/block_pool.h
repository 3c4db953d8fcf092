// BlockPool: which KV blocks are free. Knows block ids, never sequences.
#ifndef CACHALOT_ENGINE_SCHEDULE_BLOCK_POOL_H_
#define CACHALOT_ENGINE_SCHEDULE_BLOCK_POOL_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace cachalot {

// One thread: the step thread.
class BlockPool {
 public:
  explicit BlockPool(int num_blocks);

  int num_blocks() const { return static_cast<int>(is_used_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_used() const { return num_blocks() - num_free(); }

  // Appends `count` blocks to `blocks`, or does nothing and returns false when so many are not free.
  bool Allocate(int count, std::vector<int32_t>* blocks);

  // Gives blocks back; each must be in use.
  void Release(absl::Span<const int32_t> blocks);

 private:
  std::vector<int32_t> free_;  // a stack: the block given back last is warm and goes out first
  std::vector<bool> is_used_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_BLOCK_POOL_H_
