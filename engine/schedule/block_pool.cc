// BlockPool: a stack of free block ids.
#include "engine/schedule/block_pool.h"

#include "kernels/check.h"

namespace cachalot {

BlockPool::BlockPool(int num_blocks) : is_used_(num_blocks, false) {
  free_.reserve(num_blocks);
  for (int b = num_blocks; b-- > 0;) free_.push_back(b);
}

bool BlockPool::Allocate(int count, std::vector<int32_t>* blocks) {
  if (count > num_free()) return false;
  for (int i = 0; i < count; ++i) {
    const int32_t block = free_.back();
    free_.pop_back();
    is_used_[block] = true;
    blocks->push_back(block);
  }
  return true;
}

void BlockPool::Release(absl::Span<const int32_t> blocks) {
  for (int32_t block : blocks) {
    CHECK(block >= 0 && block < num_blocks() && is_used_[block], "block {} is not in use", block);
    is_used_[block] = false;
    free_.push_back(block);
  }
}

}  // namespace cachalot
