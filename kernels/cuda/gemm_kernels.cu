// GEMM kernels. The tensor core kernel takes 128 rows of the weight as M of wgmma and a few tokens as N, so that few
// tokens waste nothing: y^T = w * x^T. Tiles come by TMA. FP8 sums are promoted to fp32 every 128 of the inner
// dimension, times the scales (DeepSeek-V3 report, 3.3.2).
#include <cooperative_groups.h>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_kernels.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/splits.h"

namespace cachalot {
namespace {

constexpr int kTileRows = 128;  // of the weight
constexpr int kBlockBytes = kInnerBlockBytes;
constexpr int kMaxGroups = 512;

// ---- Which tile is next.

struct Work {
  GemmArguments g;
  int32_t token_tiles;  // without offsets: of every group
  int32_t num_splits;
  int32_t num_blocks;  // of the inner dimension
};

struct Item {
  int32_t group, token_tile, weight_tile, split;
  int64_t first_row;  // of x and y, within the group's pointers
  int32_t num_tokens;
};

// first_item[g]: the items of groups before g. Called by the whole block.
template <int kTokens>
__device__ int32_t ScanGroups(const Work& work, int32_t* first_item) {
  const int32_t groups = work.g.w.num_groups, tiles = work.g.w.num_tiles;
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

// Neighbours in order share a tile of the weight.
template <int kTokens>
__device__ Item ItemAt(const Work& work, const int32_t* first_item, int32_t index) {
  Item item;
  int32_t token_tiles = work.token_tiles, rest = index;
  int64_t num_rows = work.g.num_rows;
  item.first_row = 0;
  if (work.g.offsets == nullptr) {
    const int32_t per_group = token_tiles * work.g.w.num_tiles * work.num_splits;
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
  item.token_tile = rest % token_tiles;
  item.weight_tile = rest / token_tiles;
  item.first_row += static_cast<int64_t>(item.token_tile) * kTokens;
  item.num_tokens = static_cast<int32_t>(min(static_cast<int64_t>(kTokens), num_rows - item.token_tile * kTokens));
  return item;
}

// ---- The tensor core kernel: a warpgroup brings tiles, two multiply them, 64 rows of the weight each.

constexpr int kConsumers = 256, kProducers = 128;

template <int kTokens, bool kFp8>
struct Tile {
  static constexpr int kBlocksPerSm = kTokens <= 32 ? 2 : 1;
  static constexpr int kWeightBytes = kTileRows * kBlockBytes;
  static constexpr int kTokenBytes = kTokens * kBlockBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kScaleBytes = kFp8 ? kTokens * 4 : 0;  // of a stage, behind all stages
  static constexpr int kElementBytes = kFp8 ? 1 : 2;
  static constexpr int kStages = (kBlocksPerSm == 2 ? 110 : 200) * 1024 / (kStageBytes + kScaleBytes);
  static constexpr int kSharedBytes = kStages * (kStageBytes + kScaleBytes);
  // Parts of a split product meet where the stages were: [kTokens][128 + padding] f32.
  static constexpr int kOutStride = kTileRows + 4;
  static_assert(kTokens * kOutStride * 4 <= kStages * kStageBytes);
};

// A ring of stages: whose turn it is, and in which round.
template <int kStages>
struct Ring {
  uint32_t full, empty;  // barriers
  int stage = 0;
  uint32_t round = 0;
  __device__ uint32_t Full() const { return full + 8 * stage; }
  __device__ uint32_t Empty() const { return empty + 8 * stage; }
  __device__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    round ^= 1;
  }
};

// The steps of one item into the ring: zeros beyond the weight's rows and both inner dimensions' ends. Rows of x beyond
// the item's are whatever lies there: they make columns of the product that nobody keeps. `is_early`: the ring is new,
// and x may not be there yet; the weight is.
template <int kTokens, bool kFp8>
__device__ void Produce(const Work& work, const Item& item, const RowTile& tile, const CUtensorMap* w_map,
                        const CUtensorMap* x_map, uint32_t shared, int32_t begin, int32_t end,
                        Ring<Tile<kTokens, kFp8>::kStages>& ring, bool is_early) {
  using T = Tile<kTokens, kFp8>;
  const int thread = threadIdx.x - kConsumers;
  const auto begin_stage = [&](int stage, uint32_t full, int32_t block) {
    BarrierExpect(full, T::kStageBytes);
    CopyTile(shared + stage * T::kStageBytes, w_map, full, block * (kBlockBytes / T::kElementBytes), tile.first_row,
             item.group);
  };
  const int32_t num_early = is_early ? min(T::kStages, end - begin) : 0;
  if (is_early) {
    if (thread == 0) {
      for (int i = 0; i < num_early; ++i) begin_stage(i, ring.full + 8 * i, begin + i);
    }
    WaitForKernelBefore();
  }
  const int32_t first_column = static_cast<int32_t>(item.group * work.g.x_group_stride);
  const bool has_scale = thread < item.num_tokens;
  const float* scales =
      kFp8 ? work.g.x.scales + (item.first_row + (has_scale ? thread : 0)) * work.g.x.scale_stride : nullptr;
  for (int32_t block = begin; block < end; ++block, ring.Next()) {
    BarrierWait(ring.Empty(), ring.round ^ 1);
    const uint32_t stage = shared + ring.stage * T::kStageBytes;
    const int32_t column = block * (kBlockBytes / T::kElementBytes);
    if (thread == 0) {
      if (block - begin >= num_early) begin_stage(ring.stage, ring.Full(), block);
      CopyTile(stage + T::kWeightBytes, x_map, ring.Full(), first_column + column,
               static_cast<int32_t>(item.first_row));
    }
    if constexpr (kFp8) {
      if (thread < kTokens) {
        const uint32_t to = shared + T::kStages * T::kStageBytes + ring.stage * T::kScaleBytes + thread * 4;
        CopyAsync4(to, scales + block, has_scale ? 4 : 0);
      }
      BarrierArriveWhenCopied(ring.Full());
    }
  }
}

// sum += part times the scales of the tile's rows and of the tokens.
template <int kTokens>
__device__ __forceinline__ void Promote(const float* x_scales, float w_scale, const float (&part)[kTokens / 2],
                                        float (&sum)[kTokens / 2]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(x_scales + 8 * j + 2 * (threadIdx.x % 4));
    const float scales[2] = {w_scale * scale.x, w_scale * scale.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[4 * j + i] = fmaf(part[4 * j + i], scales[i % 2], sum[4 * j + i]);
  }
}

// The products of one step, queued.
template <int kTokens, bool kFp8>
__device__ __forceinline__ void Multiply(uint32_t stage, float (&d)[kTokens / 2]) {
  const uint64_t a = KMajorDescriptor(stage + threadIdx.x / 128 * 64 * kBlockBytes);
  const uint64_t b = KMajorDescriptor(stage + Tile<kTokens, kFp8>::kWeightBytes);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kBlockBytes / 32; ++k) {
    if constexpr (kFp8) {
      WgmmaE4m3<kTokens>(d, a + 2 * k, b + 2 * k, k > 0);
    } else {
      WgmmaBf16<kTokens>(d, a + 2 * k, b + 2 * k, true);
    }
  }
  WgmmaCommit();
}

// This thread's part of the product over steps begin .. end. While one warpgroup promotes, the other multiplies.
template <int kTokens, bool kFp8>
__device__ void Consume(const float* w_scales, const uint8_t* memory, int32_t begin, int32_t end,
                        Ring<Tile<kTokens, kFp8>::kStages>& ring, float (&sum)[kTokens / 2]) {
  using T = Tile<kTokens, kFp8>;
  const uint32_t shared = SharedAddress(memory);
  const float* scales = reinterpret_cast<const float*>(memory + T::kStages * T::kStageBytes);
#pragma unroll
  for (float& value : sum) value = 0;
  if constexpr (kFp8) {
    float next_scale = __ldg(w_scales + begin);
    for (int32_t block = begin; block < end; ++block, ring.Next()) {
      const float w_scale = next_scale;
      if (block + 1 < end) next_scale = __ldg(w_scales + block + 1);
      float part[kTokens / 2];
      BarrierWait(ring.Full(), ring.round);
      Multiply<kTokens, true>(shared + ring.stage * T::kStageBytes, part);
      WgmmaWait<0>();
      WgmmaKeep(part);
      Promote<kTokens>(scales + ring.stage * kTokens, w_scale, part, sum);
      BarrierArrive(ring.Empty());
    }
    return;
  }
  uint32_t before = 0;  // the barrier of the step before
  for (int32_t block = begin; block < end; ++block, ring.Next()) {
    BarrierWait(ring.Full(), ring.round);
    Multiply<kTokens, false>(shared + ring.stage * T::kStageBytes, sum);
    WgmmaWait<1>();
    if (block > begin) BarrierArrive(before);
    before = ring.Empty();
  }
  WgmmaWait<0>();
  WgmmaKeep(sum);
  if (end > begin) BarrierArrive(before);
}

// Straight to y: eight lanes have neighbouring rows of the weight.
template <int kTokens>
__device__ void Store(const Work& work, const Item& item, const RowTile& tile, const float (&sum)[kTokens / 2]) {
  const MatrixRef& y = work.g.y;
  const int row = threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4, token = 2 * (threadIdx.x % 4);
  const int64_t first = item.group * work.g.y_group_stride + item.first_row * y.row_stride + tile.first_row + row;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (8 * j + token + c >= item.num_tokens) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i >= tile.num_rows) continue;
        StoreNumber(y.data, first + (8 * j + token + c) * y.row_stride + 8 * i, y.type, sum[4 * j + 2 * i + c]);
      }
    }
  }
}

// out[token][row] in shared memory.
template <int kTokens>
__device__ void StageOut(float* out, int stride, const float (&sum)[kTokens / 2]) {
  const int row = threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4, token = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) out[(8 * j + token + c) * stride + row + 8 * i] = sum[4 * j + 2 * i + c];
    }
  }
}

// Four neighbours of the product: the blocks of the cluster have a part each, which are added in their order.
__device__ float4 SumOfSplits(float* out, int num_splits) {
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

// Each block of a cluster writes its share of the tile.
__device__ void StoreSplits(const Work& work, const Item& item, const RowTile& tile, float* out, int stride) {
  constexpr int kWidth = 4;
  const MatrixRef& y = work.g.y;
  const int64_t first = item.group * work.g.y_group_stride + item.first_row * y.row_stride + tile.first_row;
  const bool is_aligned = y.type == NumberType::kBF16 && tile.num_rows % kWidth == 0 && y.row_stride % kWidth == 0 &&
                          (reinterpret_cast<uintptr_t>(y.data) + first * 2) % 8 == 0;
  for (int i = item.split * kConsumers + threadIdx.x; i < item.num_tokens * (kTileRows / kWidth);
       i += work.num_splits * kConsumers) {
    const int token = i / (kTileRows / kWidth), row = i % (kTileRows / kWidth) * kWidth;
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

template <int kTokens, bool kFp8>
__global__ void __launch_bounds__(kConsumers + kProducers, Tile<kTokens, kFp8>::kBlocksPerSm)
    TensorGemm(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map, const Work work) {
  using T = Tile<kTokens, kFp8>;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ int32_t first_item[kMaxGroups + 1];
  __shared__ uint64_t full[T::kStages], empty[T::kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      BarrierInit(SharedAddress(&full[i]), 1 + (kFp8 ? kProducers : 0));
      BarrierInit(SharedAddress(&empty[i]), kConsumers);
    }
    BarrierInitDone();
  }
  const int32_t num_items = ScanGroups<kTokens>(work, first_item);
  __syncthreads();
  AllowNextKernel();
  Ring<T::kStages> ring{SharedAddress(full), SharedAddress(empty)};
  bool is_early = work.g.offsets == nullptr;  // else the kernel before says what the items are
  const bool is_producer = threadIdx.x >= kConsumers;
  // NOTE: the splits of a tile are neighbours in order, so the blocks of a cluster have one item each, of the same
  // tile.
  for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x) {
    const Item item = ItemAt<kTokens>(work, first_item, index);
    const RowTile tile = work.g.w.tiles[item.weight_tile];
    const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(work.num_blocks) * item.split / work.num_splits);
    const int32_t end =
        static_cast<int32_t>(static_cast<int64_t>(work.num_blocks) * (item.split + 1) / work.num_splits);
    if (is_producer) {
      Produce<kTokens, kFp8>(work, item, tile, &w_map, &x_map, SharedAddress(shared), begin, end, ring, is_early);
      is_early = false;
      if (work.num_splits == 1) continue;
      cooperative_groups::this_cluster().sync();
      cooperative_groups::this_cluster().sync();
      continue;
    }
    const WeightRef& w = work.g.w;
    const float* w_scales =
        w.scales + item.group * w.group_scales + static_cast<int64_t>(tile.scale_row) * w.scale_cols;
    float sum[kTokens / 2];
    Consume<kTokens, kFp8>(w_scales, shared, begin, end, ring, sum);
    if (work.num_splits == 1) {
      Store<kTokens>(work, item, tile, sum);
      continue;
    }
    float* out = reinterpret_cast<float*>(shared);
    SyncThreads(1, kConsumers);  // nobody reads the stages any more
    StageOut<kTokens>(out, T::kOutStride, sum);
    cooperative_groups::this_cluster().sync();
    StoreSplits(work, item, tile, out, T::kOutStride);
    cooperative_groups::this_cluster().sync();
  }
}

// ---- The plain kernel: every type, every alignment. 32 rows of the weight times 32 tokens a block.

constexpr int kPlain = 32;

__device__ float WeightValue(const WeightRef& w, int32_t group, const RowTile& tile, int32_t row, int32_t col) {
  const uint8_t* data =
      static_cast<const uint8_t*>(w.data) + group * w.group_bytes + (tile.first_row + row) * w.row_bytes;
  const float value = LoadNumber(data, col, w.type);
  if (w.type != NumberType::kE4M3) return value;
  return value * w.scales[group * w.group_scales + static_cast<int64_t>(tile.scale_row) * w.scale_cols + col / 128];
}

// blockIdx: x 32 rows of a row tile, y 32 tokens, z group. 256 threads, four products each.
__global__ void __launch_bounds__(256) PlainGemm(const GemmArguments g) {
  __shared__ float xs[kPlain][kPlain + 1], ws[kPlain][kPlain + 1];
  const int32_t group = blockIdx.z;
  const int64_t begin = g.offsets != nullptr ? g.offsets[group] : 0;
  const int64_t count = g.offsets != nullptr ? g.offsets[group + 1] - begin : g.num_rows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kPlain;
  const RowTile tile = g.w.tiles[blockIdx.x / (kTileRows / kPlain)];
  const int32_t first_row = blockIdx.x % (kTileRows / kPlain) * kPlain;
  if (first_token >= count || first_row >= tile.num_rows) return;
  const int column = threadIdx.x % kPlain, line = threadIdx.x / kPlain;
  float sum[4] = {};
  for (int32_t k = 0; k < g.w.cols; k += kPlain) {
    for (int i = line; i < kPlain; i += 8) {
      const int32_t col = k + column;
      float x = 0, w = 0;
      if (col < g.w.cols && first_token + i < count) {
        const int64_t row = begin + first_token + i;
        x = LoadNumber(g.x.values.data, group * g.x_group_stride + row * g.x.values.row_stride + col, g.x.values.type);
        if (g.x.scales != nullptr) x *= g.x.scales[row * g.x.scale_stride + col / 128];
      }
      if (col < g.w.cols && first_row + i < tile.num_rows) w = WeightValue(g.w, group, tile, first_row + i, col);
      xs[i][column] = x;
      ws[i][column] = w;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPlain; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(xs[line + 8 * i][j], ws[column][j], sum[i]);
    }
    __syncthreads();
  }
  if (first_row + column >= tile.num_rows) return;
  for (int i = 0; i < 4; ++i) {
    const int64_t token = first_token + line + 8 * i;
    if (token >= count) continue;
    StoreNumber(g.y.data,
                group * g.y_group_stride + (begin + token) * g.y.row_stride + tile.first_row + first_row + column,
                g.y.type, sum[i]);
  }
}

// ---- Launching.

template <int kTokens, bool kFp8>
bool LaunchTensorGemm(cudaStream_t stream, const GemmArguments& g) {
  using T = Tile<kTokens, kFp8>;
  Work work;
  work.g = g;
  work.num_blocks = (g.w.cols * T::kElementBytes + kBlockBytes - 1) / kBlockBytes;
  work.token_tiles = static_cast<int32_t>((g.num_rows + kTokens - 1) / kTokens);
  work.num_splits = 1;
  int64_t items = static_cast<int64_t>(g.w.num_groups) * g.w.num_tiles * work.token_tiles;
  if (g.offsets == nullptr) {
    // NOTE: the same for all kTokens, so that up to 128 rows their number does not change the order of the sum.
    work.num_splits = NumInnerSplits(items, work.num_blocks, g.num_sms);
    items *= work.num_splits;
  } else {
    // At most: every group begins one tile more than its share of the rows fills.
    items = (g.num_rows / kTokens + g.w.num_groups) * g.w.num_tiles;
  }
  const int64_t x_width = g.w.cols + (g.offsets == nullptr ? (g.w.num_groups - 1) * g.x_group_stride : 0);
  const CUtensorMapDataType type = kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap w_map, x_map;
  if (!MakeTensorMap(&w_map, g.w.data,
                     {.type = type,
                      .cols = g.w.cols,
                      .rows = g.w.rows,
                      .row_bytes = g.w.row_bytes,
                      .num_groups = g.w.num_groups,
                      .group_bytes = g.w.group_bytes,
                      .box_rows = kTileRows}) ||
      !MakeTensorMap(&x_map, g.x.values.data,
                     {.type = type,
                      .cols = x_width,
                      .rows = g.num_rows,
                      .row_bytes = g.x.values.row_stride * T::kElementBytes,
                      .box_rows = kTokens})) {
    return false;
  }
  static const cudaError_t configured =
      cudaFuncSetAttribute(TensorGemm<kTokens, kFp8>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  (void)configured;  // NOTE: where it failed, the launch fails too
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(
      work.num_splits > 1 ? items : min(items, static_cast<int64_t>(g.num_sms) * T::kBlocksPerSm)));
  config.blockDim = dim3(kConsumers + kProducers);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (g.offsets == nullptr) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (work.num_splits > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(work.num_splits), 1, 1};
  }
  (void)cudaLaunchKernelEx(&config, TensorGemm<kTokens, kFp8>, w_map, x_map, work);  // NOTE: the caller looks at errors
  return true;
}

template <bool kFp8>
bool LaunchByTokens(cudaStream_t stream, const GemmArguments& g) {
  const int64_t rows = g.offsets == nullptr ? g.num_rows : (g.num_rows + g.w.num_groups - 1) / g.w.num_groups;
  switch (TokenTile(rows)) {
    case 8: return LaunchTensorGemm<8, kFp8>(stream, g);
    case 16: return LaunchTensorGemm<16, kFp8>(stream, g);
    case 32: return LaunchTensorGemm<32, kFp8>(stream, g);
    case 64: return LaunchTensorGemm<64, kFp8>(stream, g);
    default: return LaunchTensorGemm<128, kFp8>(stream, g);
  }
}

bool IsAligned(const GemmArguments& g, int element_bytes) {
  return reinterpret_cast<uintptr_t>(g.x.values.data) % 16 == 0 && g.x.values.row_stride * element_bytes % 16 == 0 &&
         g.x_group_stride * element_bytes % 16 == 0 && g.w.num_groups <= kMaxGroups;
}

}  // namespace

bool LaunchGemm(cudaStream_t stream, const GemmArguments& g) {
  const NumberType x = g.x.values.type, w = g.w.type;
  if (x == NumberType::kE4M3 && w == x && IsAligned(g, 1) && g.x_group_stride == 0) {
    return LaunchByTokens<true>(stream, g);
  }
  if (x == NumberType::kBF16 && w == x && IsAligned(g, 2)) return LaunchByTokens<false>(stream, g);
  const dim3 grid(g.w.num_tiles * (kTileRows / kPlain), static_cast<unsigned>((g.num_rows + kPlain - 1) / kPlain),
                  g.w.num_groups);
  PlainGemm<<<grid, 256, 0, stream>>>(g);
  return true;
}

}  // namespace cachalot
