// Which kernel and tile the GPU takes for a product, and how it cuts the inner dimension: that decides the order of the
// sum, so the CPU's oracle cuts it there too.
#ifndef CACHALOT_KERNELS_GEMM_PLAN_H_
#define CACHALOT_KERNELS_GEMM_PLAN_H_

#include <cstdint>
#include <initializer_list>

#include "kernels/splits.h"

namespace cachalot {

inline constexpr int kInnerScaleSteps = 4;  // a split begins at a multiple of so many steps
inline constexpr int kMaxInnerSplits = 8;   // blocks of a cluster

struct GemmPlan {
  enum class Kernel : uint8_t {
    kPlain,
    kFewRows,   // 128 rows of the weight times up to 64 tokens, two blocks an SM
    kManyRows,  // 128 or 256 tokens times `rows` of the weight
  };
  Kernel kernel = Kernel::kPlain;
  int16_t tokens = 0, rows = 0;  // of a tile
  int16_t splits = 1;
};

// What a plan depends on. `num_steps`: of the inner dimension, 128 bytes each.
struct GemmShape {
  int64_t num_rows = 0, num_groups = 1, weight_rows = 0, num_steps = 0;
  bool is_fp8 = true;
  bool has_offsets = false;     // rows are grouped by expert: num_rows is of all groups together
  bool has_even_tiles = false;  // rows of scales lie every 128 rows of the weight
};

// The first step of a split.
constexpr int64_t InnerSplitBegin(int64_t num_steps, int64_t num_splits, int64_t split) {
  const int64_t units = (num_steps + kInnerScaleSteps - 1) / kInnerScaleSteps;
  const int64_t begin = units * split / num_splits * kInnerScaleSteps;
  return begin < num_steps ? begin : num_steps;
}

// Blocks that run at once when tiles are split: clusters do not fit all SMs of a GPC.
constexpr int64_t BlocksAtOnce(int splits, int blocks_per_sm) {
  if (splits == 1) return kHopperSms * blocks_per_sm;
  return (splits == 2 ? 128 : splits == 3 ? 114 : 110) * blocks_per_sm;
}

// The steps of the longest split.
constexpr int64_t LongestSplit(int64_t num_steps, int splits) {
  const int64_t units = (num_steps + kInnerScaleSteps - 1) / kInnerScaleSteps;
  return (units + splits - 1) / splits * kInnerScaleSteps;
}

// Few rows: steps take as long as the weight's bytes. Two blocks an SM; a split at least four steps long.
constexpr GemmPlan PlanFewRows(const GemmShape& s) {
  constexpr int64_t kOverhead = 3;  // of a tile, in steps
  GemmPlan plan = {GemmPlan::Kernel::kFewRows, static_cast<int16_t>(s.num_rows <= 16 ? 16 : 64), 128, 1};
  const int64_t tiles = (s.weight_rows + 127) / 128 * s.num_groups;
  int64_t best_time = 0;
  for (int splits = 1; splits == 1 || (splits <= kMaxInnerSplits && s.num_steps >= splits * kInnerScaleSteps);
       ++splits) {
    const int64_t waves = (tiles * splits - 1) / BlocksAtOnce(splits, 2) + 1;
    const int64_t time = waves * (LongestSplit(s.num_steps, splits) + kOverhead);
    if (splits > 1 && time * 100 > best_time * 97) continue;
    plan.splits = static_cast<int16_t>(splits);
    best_time = time;
  }
  return plan;
}

// Many rows: the tile and splits that cost the fewest cycles. Measured on an H200: within 8 % of what tiles of 256 x
// 128, 256 x 96, 128 x 192 and 128 x 128 take at V3's shapes.
constexpr GemmPlan PlanManyRows(const GemmShape& s) {
  constexpr int64_t kTileCycles = 3000, kSplitCycles = 3000;
  GemmPlan best;
  int64_t best_time = 0;
  for (int tokens : {256, 128}) {
    for (int width : {128, 96, 192}) {
      if (width != 128 && (!s.is_fp8 || !s.has_even_tiles)) continue;
      if (width == 192 && tokens == 256) continue;
      const int64_t tiles = (s.weight_rows + width - 1) / width * s.num_groups * ((s.num_rows + tokens - 1) / tokens);
      const int64_t rows = s.num_rows < tokens ? (s.num_rows + 63) / 64 * 64 : tokens;
      const int64_t bytes = (rows + width) * 4, products = rows * width / 32;
      const int64_t step = bytes > products ? bytes : products;
      for (int splits = 1; splits == 1 || (splits <= kMaxInnerSplits && s.num_steps >= splits * kInnerScaleSteps);
           ++splits) {
        const int64_t waves = (tiles * splits - 1) / BlocksAtOnce(splits, 1) + 1;
        if (splits > 1 && waves > 1) break;
        const int64_t time =
            waves * (LongestSplit(s.num_steps, splits) * step + kTileCycles) + (splits > 1 ? kSplitCycles : 0);
        if (best_time != 0 && time >= best_time) continue;
        best = {GemmPlan::Kernel::kManyRows, static_cast<int16_t>(tokens), static_cast<int16_t>(width),
                static_cast<int16_t>(splits)};
        best_time = time;
      }
    }
  }
  return best;
}

constexpr GemmPlan PlanGemm(const GemmShape& s) {
  // NOTE: how many rows an expert has is known on the device alone; both kernels take narrower tiles where there are
  // few.
  if (s.has_offsets) {
    if (s.num_rows <= 64 * s.num_groups) return {GemmPlan::Kernel::kFewRows, 64, 128, 1};
    return {GemmPlan::Kernel::kManyRows, 256, 128, 1};
  }
  return s.num_rows <= 64 ? PlanFewRows(s) : PlanManyRows(s);
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_GEMM_PLAN_H_
