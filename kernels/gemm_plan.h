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
  if (blocks_per_sm == 2) return 228;
  return splits == 2 ? 128 : splits == 3 ? 114 : 110;
}

// The steps of the longest split.
constexpr int64_t LongestSplit(int64_t num_steps, int splits) {
  const int64_t units = (num_steps + kInnerScaleSteps - 1) / kInnerScaleSteps;
  return (units + splits - 1) / splits * kInnerScaleSteps;
}

// Up to 32 rows: steps take as long as the weight's bytes. Two blocks an SM; a split at least four steps long.
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

// Cycles of a product by tiles of `tokens` x `width`, on an H200 within some 10 % of what is measured: a step takes as
// long as its bytes from the second-level cache, 32 a cycle, or its products. 0: not to be done in one wave of
// clusters.
constexpr int64_t ProductCycles(const GemmShape& s, int64_t tokens, int64_t width, int splits, int blocks_per_sm) {
  constexpr int64_t kTileCycles = 3000;
  const int64_t tiles = (s.weight_rows + width - 1) / width * s.num_groups * ((s.num_rows + tokens - 1) / tokens);
  const int64_t waves = (tiles * splits - 1) / BlocksAtOnce(splits, blocks_per_sm) + 1;
  if (splits > 1 && waves > 1) return 0;
  const int64_t rows = s.num_rows < tokens ? (s.num_rows + 63) / 64 * 64 : tokens;
  const int64_t bytes = (rows + width) * 4, products = tokens * width / 32;
  const int64_t sharing = blocks_per_sm == 2 && tiles * splits > kHopperSms / 2 ? 2 : 1;
  const int64_t step = (bytes > products ? bytes : products) * sharing;
  const int64_t join = splits > 1 ? tokens * width * 7 / 16 : 0;
  return waves * (LongestSplit(s.num_steps, splits) * step + kTileCycles) + join;
}

// More than 32 rows: the tile and splits of the fewest cycles.
constexpr GemmPlan PlanManyRows(const GemmShape& s) {
  constexpr GemmPlan kTiles[] = {{GemmPlan::Kernel::kManyRows, 256, 128}, {GemmPlan::Kernel::kManyRows, 256, 96},
                                 {GemmPlan::Kernel::kManyRows, 128, 128}, {GemmPlan::Kernel::kManyRows, 128, 192},
                                 {GemmPlan::Kernel::kManyRows, 128, 96},  {GemmPlan::Kernel::kFewRows, 64, 128}};
  GemmPlan best;
  int64_t best_time = 0;
  for (GemmPlan plan : kTiles) {
    const bool is_few = plan.kernel == GemmPlan::Kernel::kFewRows;
    if (plan.rows != 128 && (!s.is_fp8 || !s.has_even_tiles)) continue;
    if (plan.rows == 96 && s.num_rows <= 64) continue;  // NOTE: measured, not explained
    if (is_few ? s.num_rows > 256 : plan.tokens == 256 && s.num_rows <= 128) continue;
    for (int splits = 1; splits <= kMaxInnerSplits; ++splits) {
      if (splits > 1 && s.num_steps < splits * kInnerScaleSteps) break;
      const int64_t time = ProductCycles(s, plan.tokens, plan.rows, splits, is_few ? 2 : 1);
      if (time == 0) break;
      if (best_time != 0 && time >= best_time) continue;
      best = plan;
      best.splits = static_cast<int16_t>(splits);
      best_time = time;
    }
  }
  return best;
}

constexpr GemmPlan PlanGemm(const GemmShape& s) {
  // NOTE: how many rows an expert has is known on the device alone; both kernels take narrower tiles where there are
  // few.
  if (s.has_offsets) {
    // Where that many are the average, no expert or few have more than 64, and 128.
    if (s.num_rows <= 48 * s.num_groups) return {GemmPlan::Kernel::kFewRows, 64, 128, 1};
    if (s.num_rows <= 112 * s.num_groups) return {GemmPlan::Kernel::kManyRows, 128, 128, 1};
    return {GemmPlan::Kernel::kManyRows, 256, 128, 1};
  }
  return s.num_rows <= 32 ? PlanFewRows(s) : PlanManyRows(s);
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_GEMM_PLAN_H_
