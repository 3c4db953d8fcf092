// How the GPU cuts long sums over keys: it decides their order, so the CPU oracle cuts them there too (gemm_plan.h:
// sums of products).
#ifndef CACHALOT_KERNELS_SPLITS_H_
#define CACHALOT_KERNELS_SPLITS_H_

#include <cstdint>

namespace cachalot {

inline constexpr int kInnerBlockBytes = 128;  // of the inner dimension: one step
inline constexpr int kHopperSms = 132;        // of an H100, H200 or H800

// Attention on tensor cores, the only one that is cut: C and R; a tile is so many (token, head) pairs of one sequence.
inline constexpr int kLatentDim = 512, kRopeDim = 64;
inline constexpr int kGpuTileQueries = 64;
inline constexpr int kMinSplitPages = 2;  // a split of fewer is not worth its partial result

// The pages that an item of attention's work should have, of those that a step's tiles see together.
constexpr int64_t PagesPerItem(int64_t total_pages, int num_sms) {
  const int64_t share = (total_pages + num_sms - 1) / num_sms;
  return share < kMinSplitPages ? kMinSplitPages : share;
}
// The items of a tile that sees `tile_pages`; item s begins at SplitBegin(s).
constexpr int64_t NumKeySplits(int64_t tile_pages, int64_t pages_per_item) {
  const int64_t splits = (tile_pages + pages_per_item / 2) / pages_per_item;
  return splits < 1 ? 1 : splits;
}
constexpr int64_t SplitBegin(int64_t tile_pages, int64_t num_splits, int64_t split) {
  return tile_pages * split / num_splits;
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_SPLITS_H_
