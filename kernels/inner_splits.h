// How the GPU cuts a product's inner dimension: it decides the order of a sum, so the CPU's oracle cuts it there too.
#ifndef CACHALOT_KERNELS_INNER_SPLITS_H_
#define CACHALOT_KERNELS_INNER_SPLITS_H_

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

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_INNER_SPLITS_H_
