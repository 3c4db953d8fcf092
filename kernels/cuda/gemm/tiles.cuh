// What the tensor core products share: which tile is next, a ring of stages that one warpgroup fills by TMA and two
// multiply from, scales of four steps at a time, and sums of a split inner dimension over a cluster.
//
// A step is 128 bytes of the inner dimension, a swizzled tile of the weight and one of tokens in a stage each. FP8 sums
// are promoted to fp32 every step, times the scales (DeepSeek-V3 report, 3.3.2).
#ifndef CACHALOT_KERNELS_CUDA_GEMM_TILES_CUH_
#define CACHALOT_KERNELS_CUDA_GEMM_TILES_CUH_

#include <cooperative_groups.h>
#include <cuda.h>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm/gemm.h"
#include "kernels/cuda/gemm/instructions.cuh"
#include "kernels/gemm_plan.h"

namespace cachalot::gemm {

constexpr int kStepBytes = kInnerBlockBytes;
constexpr int kConsumers = 256, kProducers = 128;
constexpr int kConsumerWarps = kConsumers / kWarpSize;
constexpr int kScaleTileRows = 128;            // rows of a weight that share a row of scales
constexpr int kScaleSteps = kInnerScaleSteps;  // steps whose scales come together, 16 bytes a row

// What becomes of a tile. NOTE: kernels of their own, as small as can be: every launch reads its code anew.
enum class Output { kRows, kSplits, kE4m3 };

// ---- Which tile is next.

struct Work {
  GemmArguments g;
  int32_t token_tiles;   // without offsets: of every group
  int32_t weight_tiles;  // of every group
  int32_t num_splits;
  int32_t split_begin[kMaxInnerSplits + 1];  // steps of the inner dimension

  // On the host.
  void Split(int64_t num_steps, int splits) {
    num_splits = splits;
    for (int s = 0; s <= splits; ++s) {
      split_begin[s] = static_cast<int32_t>(InnerSplitBegin(num_steps, splits, s));
    }
  }
};

struct Item {
  int32_t group, token_tile, weight_tile, split;
  int64_t first_row;  // of x and y, within the group's pointers
  int32_t num_tokens;
};

// first_item[g]: the items of groups before g. Called by the whole block.
template <int kTokens>
__device__ int32_t ScanGroups(const Work& work, int32_t* first_item) {
  const int32_t groups = work.g.w.num_groups, tiles = work.weight_tiles;
  if (work.g.offsets == nullptr) return groups * work.token_tiles * tiles * work.num_splits;
  const int lane = threadIdx.x % kWarpSize;
  if (threadIdx.x < kWarpSize) {
    int32_t total = 0;
    for (int32_t base = 0; base < groups; base += kWarpSize) {
      const int32_t g = base + lane;
      int32_t count = 0;
      if (g < groups) count = (work.g.offsets[g + 1] - work.g.offsets[g] + kTokens - 1) / kTokens * tiles;
      const int32_t sum = WarpScan(count);
      if (g < groups) first_item[g] = total + sum - count;
      total += __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
    }
    if (lane == 0) first_item[groups] = total;
  }
  __syncthreads();
  return first_item[groups];
}

// Neighbours in order share a tile of the weight; after 4,096 tokens all of the weight comes again, so that those
// tokens stay in the second-level cache.
template <int kTokens>
__device__ Item ItemAt(const Work& work, const int32_t* first_item, int32_t index) {
  constexpr int32_t kBandTiles = 4096 / kTokens;
  Item item;
  int32_t token_tiles = work.token_tiles, rest = index;
  int64_t num_rows = work.g.num_rows;
  item.first_row = 0;
  if (work.g.offsets == nullptr) {
    const int32_t per_group = token_tiles * work.weight_tiles * work.num_splits;
    item.group = index / per_group;
    rest = index - item.group * per_group;
  } else {
    int32_t low = 0, high = work.g.w.num_groups;  // the last group that begins at or before the item
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (first_item[middle] <= index) {
        low = middle;
      } else {
        high = middle;
      }
    }
    item.group = low;
    rest = index - first_item[low];
    item.first_row = work.g.offsets[low];
    num_rows = work.g.offsets[low + 1] - item.first_row;
    token_tiles = static_cast<int32_t>((num_rows + kTokens - 1) / kTokens);
  }
  item.split = rest % work.num_splits;
  rest /= work.num_splits;
  const int32_t band = rest / (kBandTiles * work.weight_tiles);
  rest -= band * kBandTiles * work.weight_tiles;
  const int32_t width = min(kBandTiles, token_tiles - band * kBandTiles);
  item.token_tile = band * kBandTiles + rest % width;
  item.weight_tile = rest / width;
  item.first_row += static_cast<int64_t>(item.token_tile) * kTokens;
  item.num_tokens = static_cast<int32_t>(min(static_cast<int64_t>(kTokens), num_rows - item.token_tile * kTokens));
  return item;
}

// The weight's rows of a tile, none beyond its end. `kRows` other than 128 only where scale rows lie every 128.
template <int kRows>
__device__ RowTile TileAt(const WeightRef& w, int32_t index) {
  if (kRows == kScaleTileRows && !w.has_even_tiles && index < w.num_tiles) return w.tiles[index];
  const int32_t first = index * kRows;
  return {first, max(0, min(kRows, w.rows - first)), min(first / kScaleTileRows, max(0, w.num_tiles - 1))};
}

// ---- Rings.

// Whose turn it is, and in which round; barriers of 8 bytes each.
template <int kCount>
struct Ring {
  uint32_t full, empty;
  int at = 0;
  uint32_t round = 0;
  __device__ uint32_t Full() const { return full + 8 * at; }
  __device__ uint32_t Empty() const { return empty + 8 * at; }
  __device__ void Next() {
    if (++at < kCount) return;
    at = 0;
    round ^= 1;
  }
};

// The shared memory of a kernel. Behind the stages: buffers of scales [kTokens + kScaleRows][kScaleSteps] f32.
template <int kTokens, int kRows, int kScaleRows, bool kFp8, int kBlocksPerSm>
struct Layout {
  static constexpr int kWeightBytes = kRows * kStepBytes;
  static constexpr int kTokenBytes = kTokens * kStepBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kElementBytes = kFp8 ? 1 : 2;
  static constexpr int kStepElements = kStepBytes / kElementBytes;
  static constexpr int kScaleBytes = kFp8 ? (kTokens + kScaleRows) * kScaleSteps * 4 : 0;
  static constexpr int kScaleBuffers = 3;
  static constexpr int kBudget = (kBlocksPerSm == 2 ? 110 : 222) * 1024;
  static constexpr int kFit = (kBudget - kScaleBuffers * kScaleBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + kScaleBuffers * kScaleBytes;
};

template <typename L>
struct Barriers {
  uint64_t full[L::kStages], empty[L::kStages], scale_full[L::kScaleBuffers], scale_empty[L::kScaleBuffers];

  // By one thread.
  __device__ void Init() {
    for (int i = 0; i < L::kStages; ++i) {
      BarrierInit(SharedAddress(&full[i]), 1);
      BarrierInit(SharedAddress(&empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < L::kScaleBuffers; ++i) {
      BarrierInit(SharedAddress(&scale_full[i]), kProducers);
      BarrierInit(SharedAddress(&scale_empty[i]), kConsumerWarps);
    }
    BarrierInitDone();
  }
};

template <typename L>
struct Rings {
  Ring<L::kStages> stages;
  Ring<L::kScaleBuffers> scales;
  __device__ explicit Rings(Barriers<L>& b)
      : stages{SharedAddress(b.full), SharedAddress(b.empty)},
        scales{SharedAddress(b.scale_full), SharedAddress(b.scale_empty)} {}
};

// ---- Filling stages.

// This thread's share of scales of steps `step` .. `step` + 3 of one row, zeros from `end` on.
__device__ __forceinline__ void CopyScales(uint32_t to, const float* row, int32_t step, int32_t end, bool is_aligned,
                                           bool has_row) {
  if (is_aligned) {
    CopyAsync16(to, row + step, has_row ? min(kScaleSteps, end - step) * 4 : 0);
    return;
  }
  for (int i = 0; i < kScaleSteps; ++i) {
    const bool has_value = has_row && step + i < end;
    CopyAsync4(to + 4 * i, row + (has_value ? step + i : 0), has_value ? 4 : 0);
  }
}

// What the filling warpgroup copies for an item, besides tiles.
struct ScaleSource {
  const float* x;  // [.., x_stride], of the item's first token
  const float* w;  // [.., w_stride], of the tile's first row of scales
  int64_t x_stride;
  int32_t w_stride, num_tokens;
  int32_t first_row, num_scale_rows;  // of the tile within its first row of scales; of scales from there on
  bool is_x_aligned, is_w_aligned;
};

__device__ __forceinline__ bool IsAligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ ScaleSource ScalesOf(const Work& work, const Item& item, const RowTile& tile) {
  const WeightRef& w = work.g.w;
  ScaleSource source;
  source.x_stride = work.g.x.scale_stride;
  source.x = work.g.x.scales + item.first_row * source.x_stride;
  source.w_stride = w.scale_cols;
  source.w = w.scales + item.group * w.group_scales + static_cast<int64_t>(tile.scale_row) * w.scale_cols;
  source.num_tokens = item.num_tokens;
  source.first_row = w.has_even_tiles ? tile.first_row % kScaleTileRows : 0;
  source.num_scale_rows = w.num_tiles - tile.scale_row;
  source.is_x_aligned = source.x_stride % 4 == 0 && IsAligned16(work.g.x.scales);
  source.is_w_aligned = w.scale_cols % 4 == 0 && IsAligned16(w.scales) && w.group_scales % 4 == 0;
  return source;
}

// Scales of the next four steps, by all threads of the filling warpgroup: of each token, then of each kChunk rows of
// the weight.
template <typename L, int kTokens, int kScaleRows, int kChunk>
__device__ __forceinline__ void FillScales(const ScaleSource& s, uint32_t buffers, int32_t step, int32_t end,
                                           Ring<L::kScaleBuffers>& ring) {
  BarrierWait(ring.Empty(), ring.round ^ 1);
  const int thread = threadIdx.x % kProducers;
  const uint32_t buffer = buffers + ring.at * L::kScaleBytes;
#pragma unroll
  for (int first = 0; first < kTokens; first += kProducers) {
    const int token = first + thread;
    if (token >= kTokens) break;
    const bool has_row = token < s.num_tokens;
    CopyScales(buffer + token * kScaleSteps * 4, s.x + (has_row ? token : 0) * s.x_stride, step, end, s.is_x_aligned,
               has_row);
  }
  if (thread >= kProducers - kScaleRows) {  // NOTE: where there are few tokens, of those who have none
    const int chunk = thread - (kProducers - kScaleRows), row = (s.first_row + chunk * kChunk) / kScaleTileRows;
    const bool has_row = row < s.num_scale_rows;
    CopyScales(buffer + (kTokens + chunk) * kScaleSteps * 4, s.w + (has_row ? row : 0) * s.w_stride, step, end,
               s.is_w_aligned, has_row);
  }
  BarrierArriveWhenCopied(ring.Full());
  ring.Next();
}

// By a warp that has multiplied, or scaled, from it.
__device__ __forceinline__ void Release(uint32_t empty) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) BarrierArrive(empty);
}

// ---- Split inner dimensions.

// Four neighbours of the product: the blocks of the cluster have a part each, which are added in their order.
__device__ __forceinline__ float4 SumOfSplits(float* out, int num_splits) {
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  float4 sum = make_float4(0, 0, 0, 0);
  for (int s = 0; s < num_splits; ++s) {
    const float4 part = *reinterpret_cast<const float4*>(cluster.map_shared_rank(out, s));
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  return sum;
}

// Each block of a cluster writes its share of the tile, whose parts stand as out [tokens][stride] in their shared
// memory, kRows of a token's stride used.
template <int kRows>
__device__ void StoreSplits(const Work& work, const Item& item, const RowTile& tile, float* out, int stride) {
  constexpr int kWidth = 4;
  const MatrixRef& y = work.g.y.values;
  const int64_t first = item.group * work.g.y_group_stride + item.first_row * y.row_stride + tile.first_row;
  const bool is_aligned = y.type == NumberType::kBF16 && tile.num_rows % kWidth == 0 && y.row_stride % kWidth == 0 &&
                          (reinterpret_cast<uintptr_t>(y.data) + first * 2) % 8 == 0;
  for (int i = item.split * kConsumers + threadIdx.x; i < item.num_tokens * (kRows / kWidth);
       i += work.num_splits * kConsumers) {
    const int token = i / (kRows / kWidth), row = i % (kRows / kWidth) * kWidth;
    if (row >= tile.num_rows) continue;
    const float4 sum = SumOfSplits(out + token * stride + row, work.num_splits);
    const int64_t at = first + token * y.row_stride + row;
    if (is_aligned) {
      const __nv_bfloat162 packed[2] = {__floats2bfloat162_rn(sum.x, sum.y), __floats2bfloat162_rn(sum.z, sum.w)};
      *reinterpret_cast<uint2*>(static_cast<bf16*>(y.data) + at) = *reinterpret_cast<const uint2*>(packed);
      continue;
    }
    const float values[kWidth] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (row + k < tile.num_rows) StoreNumber(y.data, at + k, y.type, values[k]);
    }
  }
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

}  // namespace cachalot::gemm

#endif  // CACHALOT_KERNELS_CUDA_GEMM_TILES_CUH_
