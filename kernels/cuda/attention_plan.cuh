// How a step's attention is cut into items, on the device: tiles of queries of one sequence, each with a run of blocks
// of keys, so that all SMs have work and end together.
#ifndef CACHALOT_KERNELS_CUDA_ATTENTION_PLAN_CUH_
#define CACHALOT_KERNELS_CUDA_ATTENTION_PLAN_CUH_

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/common.cuh"
#include "kernels/splits.h"

namespace cachalot {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kMaxSplitsPerSm = 2;

struct QueryTile {
  int32_t first_token, num_rows;  // rows (token, head) of the sequence: [64 * index, ...) of num_rows
  int32_t index, slot;
  int32_t kv_len;                     // keys that its last row sees
  int32_t num_splits, first_partial;  // first_partial -1: one item writes the result
};

struct WorkItem {
  int32_t tile, block_begin, block_end, partial;
};

struct Plan {
  int32_t* header;       // {items, next item, split tiles}
  int32_t* first_tile;   // [S+1]
  int32_t* split_tiles;  // [num_sms]
  int32_t* order;        // items, the longest first
  WorkItem* items;
  QueryTile* tiles;
};

__host__ __device__ int64_t MaxTiles(int num_tokens, int num_sequences, int num_heads) {
  return static_cast<int64_t>(num_tokens) * num_heads / kGpuTileQueries + num_sequences + 1;
}

__host__ __device__ Plan PlanAt(void* memory, int num_tokens, int num_sequences, int num_heads, int num_sms) {
  Plan plan;
  plan.header = static_cast<int32_t*>(memory);
  plan.first_tile = plan.header + 8;
  plan.split_tiles = plan.first_tile + (num_sequences + 8) / 8 * 8;
  const int64_t max_items = MaxTiles(num_tokens, num_sequences, num_heads) + kMaxSplitsPerSm * num_sms;
  plan.order = plan.split_tiles + (num_sms + 7) / 8 * 8;
  plan.items = reinterpret_cast<WorkItem*>(plan.order + (max_items + 7) / 8 * 8);
  plan.tiles = reinterpret_cast<QueryTile*>(plan.items + max_items);
  return plan;
}

// The sum of `value` over the threads before this one; `total` over all. Called by all kPlanThreads threads.
__device__ int32_t BlockScan(int32_t value, int32_t* total) {
  __shared__ int32_t sums[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int32_t sum = WarpScan(value);
  if (lane == kWarpSize - 1) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) sums[lane] = WarpScan(sums[lane]);
  __syncthreads();
  *total = sums[kWarpSize - 1];
  const int32_t before = (warp > 0 ? sums[warp - 1] : 0) + sum - value;
  __syncthreads();
  return before;
}

__device__ int32_t NumQueries(const AttentionArguments& a, int32_t s) {
  const int32_t rows = a.query_start[s + 1] - a.query_start[s];
  return a.seq_slot[s] < 0 || rows >= a.max_rows ? 0 : rows;
}

// first_tile[s]: the tiles of sequences before s; returns their number.
__device__ int32_t CountTiles(const AttentionArguments& a, const Plan& plan) {
  int32_t total = 0;
  for (int32_t base = 0; base < a.num_sequences; base += kPlanThreads) {
    const int32_t s = base + static_cast<int32_t>(threadIdx.x);
    const int32_t count =
        s < a.num_sequences ? (NumQueries(a, s) * a.num_heads + kGpuTileQueries - 1) / kGpuTileQueries : 0;
    int32_t sum;
    const int32_t before = BlockScan(count, &sum);
    if (s < a.num_sequences) plan.first_tile[s] = total + before;
    total += sum;
  }
  if (threadIdx.x == 0) plan.first_tile[a.num_sequences] = total;
  __syncthreads();
  return total;
}

__device__ QueryTile TileAt(const AttentionArguments& a, const Plan& plan, int32_t tile) {
  int32_t low = 0, high = a.num_sequences;  // the last sequence that begins at or before the tile
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (plan.first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  QueryTile t;
  t.first_token = a.query_start[low];
  t.num_rows = NumQueries(a, low) * a.num_heads;
  t.index = tile - plan.first_tile[low];
  t.slot = a.seq_slot[low];
  const int32_t last_row = min((t.index + 1) * kGpuTileQueries, t.num_rows) - 1;
  t.kv_len = a.positions[t.first_token + last_row / a.num_heads] + 1;
  return t;
}

// Longest first, so that the blocks that take them one by one end together. Items as long as each other, nearly, come
// in any order: it decides who works, not what comes out.
__device__ void OrderItems(const Plan& plan, int32_t num_items) {
  __shared__ int32_t next[kPlanThreads], longest;
  next[threadIdx.x] = 0;
  if (threadIdx.x == 0) longest = 1;
  __syncthreads();
  const auto length = [&](int32_t i) { return plan.items[i].block_end - plan.items[i].block_begin; };
  for (int32_t i = threadIdx.x; i < num_items; i += kPlanThreads) atomicMax(&longest, length(i));
  __syncthreads();
  const auto bucket = [&](int32_t i) {
    return kPlanThreads - 1 - static_cast<int32_t>(static_cast<int64_t>(length(i)) * (kPlanThreads - 1) / longest);
  };
  for (int32_t i = threadIdx.x; i < num_items; i += kPlanThreads) atomicAdd(&next[bucket(i)], 1);
  __syncthreads();
  int32_t total;
  const int32_t before = BlockScan(next[threadIdx.x], &total);
  next[threadIdx.x] = before;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < num_items; i += kPlanThreads) plan.order[atomicAdd(&next[bucket(i)], 1)] = i;
}

__global__ void __launch_bounds__(kPlanThreads) PlanAttention(const AttentionArguments a) {
  const Plan plan = PlanAt(a.plan, a.num_tokens, a.num_sequences, a.num_heads, a.num_sms);
  const int32_t num_tiles = CountTiles(a, plan);
  // How many blocks there are in all, and so how many an item should have.
  int32_t blocks = 0, total_blocks;
  for (int32_t i = threadIdx.x; i < num_tiles; i += kPlanThreads) {
    plan.tiles[i] = TileAt(a, plan, i);
    blocks += (plan.tiles[i].kv_len + kPageTokens - 1) / kPageTokens;
  }
  BlockScan(blocks, &total_blocks);
  const auto per_item = static_cast<int32_t>(PagesPerItem(total_blocks, a.num_sms));

  int32_t num_items = 0, num_partials = 0, num_split_tiles = 0;
  for (int32_t base = 0; base < num_tiles; base += kPlanThreads) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    int32_t splits = 0, tile_blocks = 0;
    if (i < num_tiles) {
      tile_blocks = (plan.tiles[i].kv_len + kPageTokens - 1) / kPageTokens;
      splits = static_cast<int32_t>(NumKeySplits(tile_blocks, per_item));
    }
    const bool is_split = splits > 1;
    int32_t items, partials, split_tiles;
    const int32_t item = num_items + BlockScan(splits, &items);
    const int32_t partial = num_partials + BlockScan(is_split ? splits : 0, &partials);
    const int32_t split_tile = num_split_tiles + BlockScan(is_split ? 1 : 0, &split_tiles);
    if (i < num_tiles) {
      plan.tiles[i].num_splits = splits;
      plan.tiles[i].first_partial = is_split ? partial : -1;
      if (is_split) plan.split_tiles[split_tile] = i;
      for (int32_t s = 0; s < splits; ++s) {
        plan.items[item + s] = {i, static_cast<int32_t>(SplitBegin(tile_blocks, splits, s)),
                                static_cast<int32_t>(SplitBegin(tile_blocks, splits, s + 1)),
                                is_split ? partial + s : -1};
      }
    }
    num_items += items;
    num_partials += partials;
    num_split_tiles += split_tiles;
  }
  OrderItems(plan, num_items);
  if (threadIdx.x != 0) return;
  plan.header[0] = num_items;
  plan.header[1] = 0;
  plan.header[2] = num_split_tiles;
}

}  // namespace
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_ATTENTION_PLAN_CUH_
