// Products of many tokens: up to 256 tokens in waves of 64 are M of wgmma and 96 to 192 rows of the weight N, so that a
// thread has neighbours of a token's row to scale and to store. A tile multiplies the waves that have tokens and no
// more.
//
// Floor: operations at the FP8 rate, or the weight's bytes. What keeps from it is the way from the second-level cache,
// 32 bytes a cycle and SM: a tile of 256 x 128 brings 48 KB for 1,024 cycles of multiplying, one of 128 x 128 brings 32
// KB for 512. A thread's sums fill 128 registers and a step's products 64 more; while one warpgroup promotes the other
// multiplies. (Pairs of blocks that share their tokens' tile by multicast took 1.45 times as long.)
#include <algorithm>

#include "kernels/cuda/gemm/tiles.cuh"
#include "kernels/cuda/tensor_map.h"

namespace cachalot::gemm {
namespace {

constexpr int kWaveTokens = 64;

// kWaves: of either warpgroup. kIsUneven: tiles may have few tokens; the warpgroups' waves alternate then, so that both
// have as many, and those without tokens are left out.
template <int kWaves, int kRows, bool kFp8, bool kIsUneven>
struct ManyRows {
  static constexpr bool IsUneven() { return kIsUneven; }
  static constexpr int kTokens = 2 * kWaves * kWaveTokens;
  static constexpr int kGroupStride = kIsUneven ? kWaveTokens : kWaves * kWaveTokens;  // first rows of warpgroups
  static constexpr int kWaveStride = kIsUneven ? 2 * kWaveTokens : kWaveTokens;
  static constexpr int kChunks = kRows % kScaleTileRows == 0 ? 1 : 3;  // of columns with one scale each
  static constexpr int Chunk() { return kRows / kChunks; }
  using L = Layout<kTokens, kRows, kChunks, kFp8, 1>;
  static constexpr int kOutStride = kRows + 8;
  static_assert(kRows == 128 || kRows == 96 || kRows == 192);
  static_assert(kTokens * kOutStride * 4 <= L::kStages * L::kStageBytes);

  static __device__ __forceinline__ int FirstRow(int wave) {
    return threadIdx.x / 128 * kGroupStride + wave * kWaveStride;
  }
  // Of this warpgroup: waves that have tokens.
  static __device__ __forceinline__ int NumWaves(int32_t num_tokens) {
    if (!kIsUneven) return kWaves;
    return (num_tokens + (threadIdx.x < 128 ? 2 : 1) * kWaveTokens - 1) / (2 * kWaveTokens);
  }
  static __device__ __forceinline__ int NumTileWaves(int32_t num_tokens) {
    return kIsUneven ? (num_tokens + kWaveTokens - 1) / kWaveTokens : 2 * kWaves;
  }
};

struct TokenMaps {
  CUtensorMap tile, wave;  // boxes of all tokens of a tile, and of 64
};

template <typename K>
__device__ __forceinline__ void Fill(const Work& work, const Item& item, const RowTile& tile, const CUtensorMap* w_map,
                                     const TokenMaps* x_maps, uint32_t shared, int32_t begin, int32_t end,
                                     Rings<typename K::L>& rings, bool is_early) {
  using L = typename K::L;
  constexpr bool kFp8 = L::kElementBytes == 1;
  const int thread = threadIdx.x - kConsumers;
  const int num_waves = K::NumTileWaves(item.num_tokens);
  const int stage_bytes = L::kWeightBytes + num_waves * kWaveTokens * kStepBytes;
  const auto begin_stage = [&](int stage, uint32_t full, int32_t step) {
    BarrierExpect(full, stage_bytes);
    CopyTile(shared + stage * L::kStageBytes, w_map, full, step * L::kStepElements, tile.first_row, item.group);
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
        FillScales<L, K::kTokens, K::kChunks, K::Chunk()>(scales, shared + L::kStages * L::kStageBytes, step, end,
                                                          rings.scales);
      }
    }
    if (thread != 0) continue;
    BarrierWait(rings.stages.Empty(), rings.stages.round ^ 1);
    if (step - begin >= num_early) begin_stage(rings.stages.at, rings.stages.Full(), step);
    const uint32_t tokens = shared + rings.stages.at * L::kStageBytes + L::kWeightBytes;
    const int32_t column = first_column + step * L::kStepElements, row = static_cast<int32_t>(item.first_row);
    if (num_waves == K::kTokens / kWaveTokens) {
      CopyTile(tokens, &x_maps->tile, rings.stages.Full(), column, row);
      continue;
    }
    for (int wave = 0; wave < num_waves; ++wave) {
      CopyTile(tokens + wave * kWaveTokens * kStepBytes, &x_maps->wave, rings.stages.Full(), column,
               row + wave * kWaveTokens);
    }
  }
}

// The products of one step and 64 tokens, queued.
template <int kRows, bool kFp8>
__device__ __forceinline__ void Multiply(uint32_t tokens, uint32_t weight, float (&d)[kRows / 2]) {
  const uint64_t a = KMajorDescriptor(tokens), b = KMajorDescriptor(weight);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kStepBytes / 32; ++k) {
    if constexpr (kFp8) {
      WgmmaE4m3<kRows>(d, a + 2 * k, b + 2 * k, k > 0);
    } else {
      WgmmaBf16<kRows>(d, a + 2 * k, b + 2 * k, true);
    }
  }
  WgmmaCommit();
}

// This thread's part of the product over steps begin .. end, kActive waves of its warpgroup.
template <typename K, int kActive, int kWaves, int kRows>
__device__ __forceinline__ void ConsumeFp8(const uint8_t* memory, int32_t begin, int32_t end,
                                           Rings<typename K::L>& rings, float (&sum)[kWaves][kRows / 2]) {
  using L = typename K::L;
  const uint32_t shared = SharedAddress(memory);
  const int row = threadIdx.x % 128 / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
#pragma unroll 1
  for (int32_t step = begin; step < end; ++step, rings.stages.Next()) {
    const int phase = (step - begin) % kScaleSteps;
    if (phase == 0) BarrierWait(rings.scales.Full(), rings.scales.round);
    const float* scales =
        reinterpret_cast<const float*>(memory + L::kStages * L::kStageBytes + rings.scales.at * L::kScaleBytes) + phase;
    const uint32_t stage = shared + rings.stages.at * L::kStageBytes;
    BarrierWait(rings.stages.Full(), rings.stages.round);
#pragma unroll
    for (int wave = 0; wave < kActive; ++wave) {
      const int first = K::FirstRow(wave);
      float part[kRows / 2];
      Multiply<kRows, true>(stage + L::kWeightBytes + first * kStepBytes, stage, part);
      const float x_scales[2] = {scales[(first + row) * kScaleSteps], scales[(first + row + 8) * kScaleSteps]};
      float scale[K::kChunks][2];
#pragma unroll
      for (int chunk = 0; chunk < K::kChunks; ++chunk) {
        const float w_scale = scales[(K::kTokens + chunk) * kScaleSteps];
        scale[chunk][0] = w_scale * x_scales[0];
        scale[chunk][1] = w_scale * x_scales[1];
      }
      WgmmaWait<0>();
      WgmmaKeep(part);
      if (wave == kActive - 1) Release(rings.stages.Empty());
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        sum[wave][i] = fmaf(part[i], scale[i / (K::Chunk() / 2)][i % 4 / 2], sum[wave][i]);
      }
    }
    if constexpr (kActive == 0) Release(rings.stages.Empty());
    if (phase == kScaleSteps - 1 || step + 1 == end) {
      Release(rings.scales.Empty());
      rings.scales.Next();
    }
  }
}

// NOTE: all waves, also those without tokens: they cost less than branches around sums that go on over steps.
template <typename K, int kWaves, int kRows>
__device__ __forceinline__ void ConsumeBf16(const uint8_t* memory, int32_t begin, int32_t end,
                                            Rings<typename K::L>& rings, float (&sum)[kWaves][kRows / 2]) {
  using L = typename K::L;
  const uint32_t shared = SharedAddress(memory);
  uint32_t before = 0;  // the barrier of the step before
#pragma unroll 1
  for (int32_t step = begin; step < end; ++step, rings.stages.Next()) {
    const uint32_t stage = shared + rings.stages.at * L::kStageBytes;
    BarrierWait(rings.stages.Full(), rings.stages.round);
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      Multiply<kRows, false>(stage + L::kWeightBytes + K::FirstRow(wave) * kStepBytes, stage, sum[wave]);
    }
    WgmmaWait<kWaves>();
    if (step > begin) Release(before);
    before = rings.stages.Empty();
  }
  WgmmaWait<0>();
#pragma unroll
  for (auto& wave : sum) WgmmaKeep(wave);
  if (end > begin) Release(before);
}

// `num_waves`: of this warpgroup that have tokens.
template <typename K, int kWaves, int kRows, bool kFp8>
__device__ __forceinline__ void Consume(const uint8_t* memory, int num_waves, int32_t begin, int32_t end,
                                        Rings<typename K::L>& rings, float (&sum)[kWaves][kRows / 2]) {
#pragma unroll
  for (auto& wave : sum) {
#pragma unroll
    for (float& value : wave) value = 0;
  }
  if constexpr (!kFp8) {
    ConsumeBf16<K, kWaves, kRows>(memory, begin, end, rings, sum);
  } else if (!K::IsUneven() || num_waves == kWaves) {
    ConsumeFp8<K, kWaves, kWaves, kRows>(memory, begin, end, rings, sum);
  } else if constexpr (K::IsUneven()) {
    if (num_waves == 1) {
      ConsumeFp8<K, 1, kWaves, kRows>(memory, begin, end, rings, sum);
    } else {
      ConsumeFp8<K, 0, kWaves, kRows>(memory, begin, end, rings, sum);
    }
  }
}

// Four words of four lanes, turned around: lane q gets the others' word q. Words of lane 0 come first.
__device__ __forceinline__ uint4 TurnWords(uint32_t (&w)[4]) {
  const int q = threadIdx.x % 4;
  const bool is_high = q & 2, is_odd = q & 1;
  // Lanes 0, 1 keep words 0, 1 and get those of lanes 2, 3; and the other way round.
  const uint32_t a = __shfl_xor_sync(0xffffffffu, is_high ? w[0] : w[2], 2);
  const uint32_t b = __shfl_xor_sync(0xffffffffu, is_high ? w[1] : w[3], 2);
  const uint32_t low[2] = {is_high ? a : w[0], is_high ? b : w[1]};   // of lane q % 2
  const uint32_t high[2] = {is_high ? w[2] : a, is_high ? w[3] : b};  // of lane 2 + q % 2
  const uint32_t c = __shfl_xor_sync(0xffffffffu, is_odd ? low[0] : low[1], 1);
  const uint32_t d = __shfl_xor_sync(0xffffffffu, is_odd ? high[0] : high[1], 1);
  return is_odd ? make_uint4(c, low[1], d, high[1]) : make_uint4(low[0], c, high[0], d);
}

// Straight to y: in bf16 four lanes turn their pairs of neighbours into 64 bytes of a token's row.
template <typename K, int kWaves, int kRows>
__device__ __forceinline__ void Store(const Work& work, const Item& item, const RowTile& tile,
                                      const float (&sum)[kWaves][kRows / 2]) {
  const MatrixRef& y = work.g.y.values;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = item.group * work.g.y_group_stride + item.first_row * y.row_stride + tile.first_row;
  const bool is_aligned = y.type == NumberType::kBF16 && y.row_stride % 8 == 0 && tile.num_rows % 8 == 0 &&
                          (reinterpret_cast<uintptr_t>(y.data) + 2 * first) % 16 == 0;
#pragma unroll
  for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = K::FirstRow(wave) + threadIdx.x % 128 / kWarpSize * 16 + lane / 4 + 8 * i;
      const int64_t at = first + token * y.row_stride;
      if (is_aligned) {
#pragma unroll
        for (int j = 0; j < kRows / 8; j += 4) {
          uint32_t words[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            words[k] = PackBf16(sum[wave][4 * (j + k) + 2 * i], sum[wave][4 * (j + k) + 2 * i + 1]);
          }
          const uint4 turned = TurnWords(words);
          const int column = 8 * (j + lane % 4);
          if (token < item.num_tokens && column < tile.num_rows) {
            *reinterpret_cast<uint4*>(static_cast<bf16*>(y.data) + at + column) = turned;
          }
        }
        continue;
      }
      if (token >= item.num_tokens) continue;
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + 2 * (lane % 4) + c;
          if (column < tile.num_rows) StoreNumber(y.data, at + column, y.type, sum[wave][4 * j + 2 * i + c]);
        }
      }
    }
  }
}

template <int kWaves, int kRows, bool kFp8, Output kOutput, bool kIsUneven>
__global__ void __launch_bounds__(kConsumers + kProducers, 1)
    ManyRowsKernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ TokenMaps x_maps,
                   const __grid_constant__ Work work) {
  using K = ManyRows<kWaves, kRows, kFp8, kIsUneven>;
  using L = typename K::L;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ int32_t first_item[kMaxGroups + 1];
  __shared__ Barriers<L> barriers;
  if (threadIdx.x == 0) barriers.Init();
  bool is_early = work.g.offsets == nullptr || work.g.are_offsets_old;
  if (!is_early) WaitForKernelBefore();  // it says what the items are
  const int32_t num_items = ScanGroups<K::kTokens>(work, first_item);
  __syncthreads();
  AllowNextKernel();
  Rings<L> rings(barriers);
  // NOTE: the splits of a tile are neighbours in order, so the blocks of a cluster have one item each, of the same
  // tile.
  if (threadIdx.x >= kConsumers) {
    FewerRegisters<56>();
    for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x) {
      const Item item = ItemAt<K::kTokens>(work, first_item, index);
      const RowTile tile = TileAt<kRows>(work.g.w, item.weight_tile);
      Fill<K>(work, item, tile, &w_map, &x_maps, SharedAddress(shared), work.split_begin[item.split],
              work.split_begin[item.split + 1], rings, is_early);
      is_early = false;
      if constexpr (kOutput == Output::kRows) continue;
      cooperative_groups::this_cluster().sync();
      cooperative_groups::this_cluster().sync();
    }
    // NOTE: a kernel that ends before the one before would let the one after begin before that has ended.
    if (is_early) WaitForKernelBefore();
  } else {
    MoreRegisters<224>();
    for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x) {
      const Item item = ItemAt<K::kTokens>(work, first_item, index);
      const RowTile tile = TileAt<kRows>(work.g.w, item.weight_tile);
      float sum[kWaves][kRows / 2];
      Consume<K, kWaves, kRows, kFp8>(shared, K::NumWaves(item.num_tokens), work.split_begin[item.split],
                                      work.split_begin[item.split + 1], rings, sum);
      if constexpr (kOutput == Output::kRows) {
        Store<K, kWaves, kRows>(work, item, tile, sum);
        continue;
      }
      float* out = reinterpret_cast<float*>(shared);
      SyncThreads(1, kConsumers);  // nobody reads the stages any more
      const int row = threadIdx.x % 128 / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
      const int column = 2 * (threadIdx.x % 4);
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
        for (int i = 0; i < kRows / 2; i += 2) {
          *reinterpret_cast<float2*>(out + (K::FirstRow(wave) + row + i % 4 / 2 * 8) * K::kOutStride + i / 4 * 8 +
                                     column) = make_float2(sum[wave][i], sum[wave][i + 1]);
        }
      }
      cooperative_groups::this_cluster().sync();
      StoreSplits<kRows>(work, item, tile, out, K::kOutStride);
      cooperative_groups::this_cluster().sync();
    }
  }
}

template <int kWaves, int kRows, bool kFp8, Output kOutput, bool kIsUneven>
cudaError_t PrepareFor() {
  return cudaFuncSetAttribute(ManyRowsKernel<kWaves, kRows, kFp8, kOutput, kIsUneven>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              ManyRows<kWaves, kRows, kFp8, kIsUneven>::L::kSharedBytes);
}

template <int kWaves, int kRows, bool kFp8, bool kIsUneven = false>
cudaError_t Prepare() {
  const cudaError_t error = PrepareFor<kWaves, kRows, kFp8, Output::kRows, kIsUneven>();
  if (error != cudaSuccess || kIsUneven) return error;
  return PrepareFor<kWaves, kRows, kFp8, Output::kSplits, kIsUneven>();
}

template <int kWaves, int kRows, bool kFp8, Output kOutput, bool kIsUneven>
bool LaunchFor(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  using K = ManyRows<kWaves, kRows, kFp8, kIsUneven>;
  using L = typename K::L;
  if (plan.splits > 1 && g.offsets != nullptr) return false;
  if (kRows != kScaleTileRows && kFp8 && !g.w.has_even_tiles) return false;
  Work work;
  work.g = g;
  work.Split((g.w.cols + L::kStepElements - 1) / L::kStepElements, plan.splits);
  work.token_tiles = static_cast<int32_t>((g.num_rows + K::kTokens - 1) / K::kTokens);
  work.weight_tiles = kRows == kScaleTileRows ? g.w.num_tiles : (g.w.rows + kRows - 1) / kRows;
  int64_t items = static_cast<int64_t>(g.w.num_groups) * work.weight_tiles * work.token_tiles * work.num_splits;
  // At most: every group begins one tile more than its share of the rows fills.
  if (g.offsets != nullptr) items = (g.num_rows / K::kTokens + g.w.num_groups) * work.weight_tiles;
  const int64_t x_width = g.w.cols + (g.offsets == nullptr ? (g.w.num_groups - 1) * g.x_group_stride : 0);
  const CUtensorMapDataType type = kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const TensorMapShape tokens = {.type = type,
                                 .cols = x_width,
                                 .rows = g.num_rows,
                                 .row_bytes = g.x.values.row_stride * L::kElementBytes,
                                 .box_rows = K::kTokens};
  TensorMapShape wave = tokens;
  wave.box_rows = kWaveTokens;
  CUtensorMap w_map;
  TokenMaps x_maps;
  if (!MakeTensorMap(&w_map, g.w.data,
                     {.type = type,
                      .cols = g.w.cols,
                      .rows = g.w.rows,
                      .row_bytes = g.w.row_bytes,
                      .num_groups = g.w.num_groups,
                      .group_bytes = g.w.group_bytes,
                      .box_rows = kRows}) ||
      !MakeTensorMap(&x_maps.tile, g.x.values.data, tokens) || !MakeTensorMap(&x_maps.wave, g.x.values.data, wave)) {
    return false;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(work.num_splits > 1 ? items : std::min<int64_t>(items, g.num_sms)));
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
  (void)cudaLaunchKernelEx(&config, ManyRowsKernel<kWaves, kRows, kFp8, kOutput, kIsUneven>, w_map, x_maps, work);
  return true;
}

template <int kWaves, int kRows, bool kFp8, bool kIsUneven = false>
bool Launch(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  if constexpr (!kIsUneven) {
    if (plan.splits > 1) return LaunchFor<kWaves, kRows, kFp8, Output::kSplits, kIsUneven>(stream, g, plan);
  }
  return LaunchFor<kWaves, kRows, kFp8, Output::kRows, kIsUneven>(stream, g, plan);
}

}  // namespace

cudaError_t PrepareManyRows() {
  for (const cudaError_t error :
       {Prepare<1, 96, true>(), Prepare<1, 128, true>(), Prepare<1, 192, true>(), Prepare<2, 96, true>(),
        Prepare<2, 128, true>(), Prepare<2, 128, true, true>(), Prepare<1, 128, false>(), Prepare<2, 128, false>()}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool LaunchManyRows(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  const bool is_fp8 = g.w.type == NumberType::kE4M3, is_wide = plan.tokens == 256;
  if (!is_fp8 && plan.rows != 128) return false;
  switch (plan.rows) {
    case 96: return is_wide ? Launch<2, 96, true>(stream, g, plan) : Launch<1, 96, true>(stream, g, plan);
    case 192: return !is_wide && Launch<1, 192, true>(stream, g, plan);
    default: break;
  }
  if (!is_fp8) return is_wide ? Launch<2, 128, false>(stream, g, plan) : Launch<1, 128, false>(stream, g, plan);
  if (!is_wide) return Launch<1, 128, true>(stream, g, plan);
  return g.offsets == nullptr ? Launch<2, 128, true>(stream, g, plan) : Launch<2, 128, true, true>(stream, g, plan);
}

}  // namespace cachalot::gemm
