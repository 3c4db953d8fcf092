// How the GPU cuts long sums, of a product's inner dimension and of attention's keys: it decides their order, so the
// CPU's oracle cuts them there too.
#ifndef CACHALOT_KERNELS_SPLITS_H_
#define CACHALOT_KERNELS_SPLITS_H_

#include <cstdint>

namespace cachalot {

inline constexpr int kInnerBlockBytes = 128;  // of the inner dimension: one step
inline constexpr int kMaxInnerSplits = 8;     // blocks of a cluster
inline constexpr int kHopperSms = 132;        // of an H100, H200 or H800

// Tokens of a tile, for `rows` of them.
constexpr int TokenTile(int64_t rows) {
  return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// A product of `tiles` tiles of 128 by TokenTile, their inner dimension `num_blocks` steps long: few tiles are split,
// at least four steps each.
constexpr int NumInnerSplits(int64_t tiles, int64_t num_blocks, int num_sms) {
  int splits = 1;
  while (splits < kMaxInnerSplits && tiles * splits * 2 <= num_sms + num_sms / 16 && num_blocks >= splits * 8) {
    splits *= 2;
  }
  return splits;
}

// Attention on tensor cores, the only one that is cut: C and R; a tile is so many (token, head) pairs of one sequence.
inline constexpr int kLatentDim = 512, kRopeDim = 64;
inline constexpr int kGpuTileQueries = 64;
inline constexpr int kMinSplitPages = 4;  // a split of fewer is not worth its partial result

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
