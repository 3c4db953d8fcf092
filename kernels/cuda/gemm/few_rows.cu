// Products of few tokens: 128 rows of the weight are M of wgmma and up to 64 tokens N, so that few tokens waste
// nothing: y^T = w * x^T. Each tile takes the narrowest N that holds its tokens, so a group of experts with uneven rows
// reads every weight once as long as none has more than 64.
//
// Floor: the weight's bytes. Two blocks an SM keep 128 KB of it on their way each, one multiplies while the other ends
// a tile; a product that has fewer tiles than there are blocks is split along the inner dimension over a cluster.
#include <algorithm>

#include "kernels/cuda/gemm/tiles.cuh"
#include "kernels/cuda/tensor_map.h"

namespace cachalot::gemm {
namespace {

constexpr int kRows = 128;
constexpr int kBlocksPerSm = 2;
constexpr int kNumWidths = 4;  // 8, 16, 32 and 64 tokens

template <int kTokens, bool kFp8>
using FewRowsLayout = Layout<kTokens, kRows, 1, kFp8, kBlocksPerSm>;

struct TokenMaps {
  CUtensorMap of[kNumWidths];  // boxes of 8, 16, 32 and 64 tokens
};

__device__ __forceinline__ int WidthOf(int32_t tokens) {
  return tokens <= 8 ? 0 : tokens <= 16 ? 1 : tokens <= 32 ? 2 : 3;
}

// The steps of one item into the ring. Rows of x beyond the item's are whatever lies there: they make columns of the
// product that nobody keeps. `is_early`: the ring is new, and x may not be there yet; the weight is.
template <int kTokens, bool kFp8>
__device__ __forceinline__ void Fill(const Work& work, const Item& item, const RowTile& tile, const CUtensorMap* w_map,
                                     const TokenMaps* x_maps, uint32_t shared, int32_t begin, int32_t end,
                                     uint64_t policy, Rings<FewRowsLayout<kTokens, kFp8>>& rings, bool is_early) {
  using L = FewRowsLayout<kTokens, kFp8>;
  const int thread = threadIdx.x - kConsumers;
  const int width = WidthOf(item.num_tokens);
  const int stage_bytes = L::kWeightBytes + (8 << width) * kStepBytes;
  const auto begin_stage = [&](int stage, uint32_t full, int32_t step) {
    BarrierExpect(full, stage_bytes);
    CopyTileHinted(shared + stage * L::kStageBytes, w_map, full, step * L::kStepElements, tile.first_row, item.group,
                   policy);
  };
  const int32_t num_early = is_early ? min(L::kStages, end - begin) : 0;
  if (is_early) {
    if (thread == 0) {
      for (int i = 0; i < num_early; ++i) begin_stage(i, rings.stages.full + 8 * i, begin + i);
    }
    WaitForKernelBefore();
  }
  const int32_t first_column = static_cast<int32_t>(item.group * work.g.x_group_stride);
  ScaleSource scales;
  if constexpr (kFp8) scales = ScalesOf(work, item, tile);
#pragma unroll 1
  for (int32_t step = begin; step < end; ++step, rings.stages.Next()) {
    if constexpr (kFp8) {
      if ((step - begin) % kScaleSteps == 0) {
        FillScales<L, kTokens, 1, kRows>(scales, shared + L::kStages * L::kStageBytes, step, end, rings.scales);
      }
    }
    if (thread != 0) continue;
    BarrierWait(rings.stages.Empty(), rings.stages.round ^ 1);
    if (step - begin >= num_early) begin_stage(rings.stages.at, rings.stages.Full(), step);
    CopyTile(shared + rings.stages.at * L::kStageBytes + L::kWeightBytes, &x_maps->of[width], rings.stages.Full(),
             first_column + step * L::kStepElements, static_cast<int32_t>(item.first_row));
  }
}

// The products of one step, queued.
template <int kN, bool kFp8>
__device__ __forceinline__ void Multiply(uint32_t stage, float (&d)[kN / 2]) {
  const uint64_t a = KMajorDescriptor(stage + threadIdx.x / 128 * 64 * kStepBytes);
  const uint64_t b = KMajorDescriptor(stage + kRows * kStepBytes);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kStepBytes / 32; ++k) {
    if constexpr (kFp8) {
      WgmmaE4m3<kN>(d, a + 2 * k, b + 2 * k, k > 0);
    } else {
      WgmmaBf16<kN>(d, a + 2 * k, b + 2 * k, true);
    }
  }
  WgmmaCommit();
}

// This thread's part of the product over steps begin .. end. While one warpgroup promotes, the other multiplies.
template <int kTokens, int kN, bool kFp8>
__device__ __forceinline__ void Consume(const uint8_t* memory, int32_t begin, int32_t end,
                                        Rings<FewRowsLayout<kTokens, kFp8>>& rings, float (&sum)[kN / 2]) {
  using L = FewRowsLayout<kTokens, kFp8>;
  const uint32_t shared = SharedAddress(memory);
#pragma unroll
  for (float& value : sum) value = 0;
  if constexpr (kFp8) {
#pragma unroll 1
    for (int32_t step = begin; step < end; ++step, rings.stages.Next()) {
      const int phase = (step - begin) % kScaleSteps;
      if (phase == 0) BarrierWait(rings.scales.Full(), rings.scales.round);
      const float* scales =
          reinterpret_cast<const float*>(memory + L::kStages * L::kStageBytes + rings.scales.at * L::kScaleBytes) +
          phase;
      float part[kN / 2];
      BarrierWait(rings.stages.Full(), rings.stages.round);
      Multiply<kN, true>(shared + rings.stages.at * L::kStageBytes, part);
      const float w_scale = scales[kTokens * kScaleSteps];
      WgmmaWait<0>();
      WgmmaKeep(part);
      Release(rings.stages.Empty());
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float scale = w_scale * scales[(8 * j + 2 * (threadIdx.x % 4) + c) * kScaleSteps];
          sum[4 * j + c] = fmaf(part[4 * j + c], scale, sum[4 * j + c]);
          sum[4 * j + 2 + c] = fmaf(part[4 * j + 2 + c], scale, sum[4 * j + 2 + c]);
        }
      }
      if (phase == kScaleSteps - 1 || step + 1 == end) {
        Release(rings.scales.Empty());
        rings.scales.Next();
      }
    }
    return;
  }
  uint32_t before = 0;  // the barrier of the step before
#pragma unroll 1
  for (int32_t step = begin; step < end; ++step, rings.stages.Next()) {
    BarrierWait(rings.stages.Full(), rings.stages.round);
    Multiply<kN, false>(shared + rings.stages.at * L::kStageBytes, sum);
    WgmmaWait<1>();
    if (step > begin) Release(before);
    before = rings.stages.Empty();
  }
  WgmmaWait<0>();
  WgmmaKeep(sum);
  if (end > begin) Release(before);
}

// Straight to y. In bf16, 8 x 8 turns give a thread two neighbouring rows of the weight.
template <int kN>
__device__ __forceinline__ void Store(const Work& work, const Item& item, const RowTile& tile,
                                      const float (&sum)[kN / 2]) {
  const MatrixRef& y = work.g.y.values;
  const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * 16;
  const int64_t first = item.group * work.g.y_group_stride + item.first_row * y.row_stride + tile.first_row;
  const bool is_paired = y.type == NumberType::kBF16 && y.row_stride % 2 == 0 && tile.num_rows % 2 == 0 &&
                         (reinterpret_cast<uintptr_t>(y.data) + 2 * first) % 4 == 0;
  if (is_paired) {
    const int token = lane / 4, row = warp_row + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = Transpose8x8(PackBf16(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]));
        if (8 * j + token >= item.num_tokens || row + 8 * i >= tile.num_rows) continue;
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(y.data) + first + (8 * j + token) * y.row_stride + row +
                                     8 * i) = pair;
      }
    }
    return;
  }
  const int token = 2 * (lane % 4), row = warp_row + lane / 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (8 * j + token + c >= item.num_tokens) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i >= tile.num_rows) continue;
        StoreNumber(y.data, first + (8 * j + token + c) * y.row_stride + row + 8 * i, y.type, sum[4 * j + 2 * i + c]);
      }
    }
  }
}

__device__ __forceinline__ float RoundBf16(float x) { return __bfloat162float(__float2bfloat16(x)); }

// The largest magnitude of every token's group, as bits; of this item, and zeros for the next. NOTE: a few hundred
// bytes more would leave room for one block an SM alone.
struct Magnitudes {
  uint32_t of[2][64];
};

// The same in e4m3, of bf16: a tile's rows of the weight are a group of 128, of which all eight warps have 16. Flips
// `round`, one of the two.
template <int kN>
__device__ __forceinline__ void StoreQuantised(const Work& work, const Item& item, const RowTile& tile,
                                               const float (&sum)[kN / 2], Magnitudes& magnitudes, int& round) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float amax = fmaxf(fabsf(RoundBf16(sum[4 * j + c])), fabsf(RoundBf16(sum[4 * j + 2 + c])));
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
      }
      if (lane < 4) atomicMax(&magnitudes.of[round][8 * j + 2 * lane + c], __float_as_uint(amax));
    }
  }
  SyncThreads(2, kConsumers);
  const ActivationRef& y = work.g.y;
  const int64_t first_column = item.group * work.g.y_group_stride + tile.first_row;
  uint8_t* out =
      static_cast<uint8_t*>(y.values.data) + item.first_row * y.values.row_stride + first_column + warp * 16 + lane / 4;
  float* scales = y.scales + item.first_row * y.scale_stride + first_column / kQuantisedRows;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = 8 * j + 2 * (lane % 4) + c;
      if (token >= item.num_tokens) continue;
      const float scale = QuantScale(__uint_as_float(magnitudes.of[round][token]), y.is_ue8m0);
      if (warp == 0 && lane < 4) scales[token * y.scale_stride] = scale;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        out[token * y.values.row_stride + 8 * i] = FloatToE4m3(RoundBf16(sum[4 * j + 2 * i + c]) / scale);
      }
    }
  }
  round ^= 1;
  if (threadIdx.x < 64) magnitudes.of[round][threadIdx.x] = 0;  // NOTE: its readers have passed the barrier above
  SyncThreads(2, kConsumers);
}

constexpr int kOutStride = kRows + 4;

template <int kTokens, int kN, bool kFp8, Output kOutput>
__device__ __forceinline__ void MultiplyItem(const Work& work, const Item& item, const RowTile& tile, uint8_t* shared,
                                             int32_t begin, int32_t end, Rings<FewRowsLayout<kTokens, kFp8>>& rings,
                                             Magnitudes& magnitudes, int& round) {
  static_assert(kN * kOutStride * 4 <=
                FewRowsLayout<kTokens, kFp8>::kStages * FewRowsLayout<kTokens, kFp8>::kStageBytes);
  float sum[kN / 2];
  Consume<kTokens, kN, kFp8>(shared, begin, end, rings, sum);
  if constexpr (kOutput == Output::kRows) Store<kN>(work, item, tile, sum);
  if constexpr (kOutput == Output::kE4m3) StoreQuantised<kN>(work, item, tile, sum, magnitudes, round);
  if constexpr (kOutput != Output::kSplits) return;
  float* out = reinterpret_cast<float*>(shared);
  SyncThreads(1, kConsumers);  // nobody reads the stages any more
  const int row = threadIdx.x / kWarpSize * 16 + threadIdx.x % kWarpSize / 4, token = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) out[(i / 4 * 8 + token + i % 2) * kOutStride + row + i % 4 / 2 * 8] = sum[i];
}

template <int kTokens, bool kFp8, Output kOutput>
__global__ void __launch_bounds__(kConsumers + kProducers, kBlocksPerSm)
    FewRowsKernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ TokenMaps x_maps,
                  const __grid_constant__ Work work) {
  using L = FewRowsLayout<kTokens, kFp8>;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ int32_t first_item[kMaxGroups + 1];
  __shared__ Barriers<L> barriers;
  __shared__ Magnitudes magnitudes;  // of Output::kE4m3
  if (threadIdx.x == 0) barriers.Init();
  if (kOutput == Output::kE4m3 && threadIdx.x < 64) magnitudes.of[0][threadIdx.x] = 0;
  bool is_early = work.g.offsets == nullptr || work.g.are_offsets_old;
  if (!is_early) WaitForKernelBefore();  // it says what the items are
  const int32_t num_items = ScanGroups<kTokens>(work, first_item);
  __syncthreads();
  AllowNextKernel();
  Rings<L> rings(barriers);
  // NOTE: the splits of a tile are neighbours in order, so the blocks of a cluster have one item each, of the same
  // tile.
  if (threadIdx.x >= kConsumers) {
    FewerRegisters<48>();
    const uint64_t policy = StreamingPolicy();
    for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x) {
      const Item item = ItemAt<kTokens>(work, first_item, index);
      const RowTile tile = TileAt<kRows>(work.g.w, item.weight_tile);
      Fill<kTokens, kFp8>(work, item, tile, &w_map, &x_maps, SharedAddress(shared), work.split_begin[item.split],
                          work.split_begin[item.split + 1], policy, rings, is_early);
      is_early = false;
      if constexpr (kOutput != Output::kSplits) continue;
      cooperative_groups::this_cluster().sync();
      cooperative_groups::this_cluster().sync();
    }
    // NOTE: a kernel that ends before the one before would let the one after begin before that has ended.
    if (is_early) WaitForKernelBefore();
  } else {
    MoreRegisters<96>();
    int round = 0;  // of magnitudes
    for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x) {
      const Item item = ItemAt<kTokens>(work, first_item, index);
      const RowTile tile = TileAt<kRows>(work.g.w, item.weight_tile);
      const int32_t begin = work.split_begin[item.split], end = work.split_begin[item.split + 1];
      const int width = WidthOf(item.num_tokens);
      if (width == 0) {
        MultiplyItem<kTokens, 8, kFp8, kOutput>(work, item, tile, shared, begin, end, rings, magnitudes, round);
      } else if (kTokens == 16 || width == 1) {
        MultiplyItem<kTokens, 16, kFp8, kOutput>(work, item, tile, shared, begin, end, rings, magnitudes, round);
      } else if constexpr (kTokens > 16) {
        if (width == 2) {
          MultiplyItem<kTokens, 32, kFp8, kOutput>(work, item, tile, shared, begin, end, rings, magnitudes, round);
        } else {
          MultiplyItem<kTokens, 64, kFp8, kOutput>(work, item, tile, shared, begin, end, rings, magnitudes, round);
        }
      }
      if constexpr (kOutput != Output::kSplits) continue;
      cooperative_groups::this_cluster().sync();
      StoreSplits<kRows>(work, item, tile, reinterpret_cast<float*>(shared), kOutStride);
      cooperative_groups::this_cluster().sync();
    }
  }
}

template <int kTokens, bool kFp8, Output kOutput>
cudaError_t Prepare() {
  return cudaFuncSetAttribute(FewRowsKernel<kTokens, kFp8, kOutput>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              FewRowsLayout<kTokens, kFp8>::kSharedBytes);
}

template <int kTokens, bool kFp8, Output kOutput>
bool Launch(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  using L = FewRowsLayout<kTokens, kFp8>;
  Work work;
  work.g = g;
  work.Split((g.w.cols + L::kStepElements - 1) / L::kStepElements, plan.splits);
  work.token_tiles = static_cast<int32_t>((g.num_rows + kTokens - 1) / kTokens);
  work.weight_tiles = g.w.num_tiles;
  int64_t items = static_cast<int64_t>(g.w.num_groups) * g.w.num_tiles * work.token_tiles * work.num_splits;
  if (g.offsets != nullptr) {
    if (plan.splits != 1) return false;
    // At most: every group begins one tile more than its share of the rows fills.
    items = (g.num_rows / kTokens + g.w.num_groups) * g.w.num_tiles;
  }
  const int64_t x_width = g.w.cols + (g.offsets == nullptr ? (g.w.num_groups - 1) * g.x_group_stride : 0);
  const CUtensorMapDataType type = kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap w_map;
  TokenMaps x_maps = {};
  if (!MakeTensorMap(&w_map, g.w.data,
                     {.type = type,
                      .cols = g.w.cols,
                      .rows = g.w.rows,
                      .row_bytes = g.w.row_bytes,
                      .num_groups = g.w.num_groups,
                      .group_bytes = g.w.group_bytes,
                      .box_rows = kRows})) {
    return false;
  }
  for (int i = 0; i < kNumWidths && (8 << i) <= kTokens; ++i) {
    if (!MakeTensorMap(&x_maps.of[i], g.x.values.data,
                       {.type = type,
                        .cols = x_width,
                        .rows = g.num_rows,
                        .row_bytes = g.x.values.row_stride * L::kElementBytes,
                        .box_rows = 8 << i})) {
      return false;
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(
      work.num_splits > 1 ? items : std::min(items, static_cast<int64_t>(g.num_sms) * kBlocksPerSm)));
  config.blockDim = dim3(kConsumers + kProducers);
  config.dynamicSmemBytes = L::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  if (work.num_splits > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(work.num_splits), 1, 1};
  }
  // NOTE: the caller looks at errors.
  (void)cudaLaunchKernelEx(&config, FewRowsKernel<kTokens, kFp8, kOutput>, w_map, x_maps, work);
  return true;
}

// By the widest item, and what operands are.
template <Output kOutput>
bool LaunchAs(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  const bool is_narrow = plan.tokens <= 16;
  if (g.w.type != NumberType::kE4M3) {
    return is_narrow ? Launch<16, false, kOutput>(stream, g, plan) : Launch<64, false, kOutput>(stream, g, plan);
  }
  if constexpr (kOutput == Output::kE4m3) {
    return false;  // made of bf16 alone
  } else {
    return is_narrow ? Launch<16, true, kOutput>(stream, g, plan) : Launch<64, true, kOutput>(stream, g, plan);
  }
}

}  // namespace

cudaError_t PrepareFewRows() {
  for (const cudaError_t error :
       {Prepare<16, true, Output::kRows>(), Prepare<16, true, Output::kSplits>(), Prepare<64, true, Output::kRows>(),
        Prepare<64, true, Output::kSplits>(), Prepare<16, false, Output::kRows>(),
        Prepare<16, false, Output::kSplits>(), Prepare<16, false, Output::kE4m3>(), Prepare<64, false, Output::kRows>(),
        Prepare<64, false, Output::kSplits>(), Prepare<64, false, Output::kE4m3>()}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool LaunchFewRows(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  if (g.y.values.type == NumberType::kE4M3) return plan.splits == 1 && LaunchAs<Output::kE4m3>(stream, g, plan);
  return plan.splits > 1 ? LaunchAs<Output::kSplits>(stream, g, plan) : LaunchAs<Output::kRows>(stream, g, plan);
}

}  // namespace cachalot::gemm
