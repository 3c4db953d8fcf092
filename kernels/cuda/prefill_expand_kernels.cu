// Before attention of long prefill chunks: their list, rotated queries, latents out of the cache's pages, and the
// product that makes keys and values of them. A block keeps 128 latents in shared memory and takes the heads' W_UK and
// W_UV past them, one warpgroup those, the other these; while one stores, the other multiplies.
#include <algorithm>

#include "kernels/cuda/prefill_plan.cuh"
#include "kernels/cuda/tensor_map.h"

namespace cachalot {
namespace {

// ---- The chunks.

// One warp.
__global__ void __launch_bounds__(kWarpSize) PlanPrefill(const PrefillArguments a) {
  auto* plan = static_cast<PrefillPlan*>(a.plan);
  const int lane = threadIdx.x;
  int32_t num_chunks = 0, num_tiles = 0;
  for (int32_t base = 0; base < a.num_sequences; base += kWarpSize) {
    const int32_t s = base + lane;
    Chunk chunk = {};
    if (s < a.num_sequences) {
      chunk.first_row = a.query_start[s];
      chunk.num_rows = a.query_start[s + 1] - chunk.first_row;
      chunk.slot = a.seq_slot[s];
    }
    const bool is_chunk = chunk.num_rows >= a.long_chunks.min_rows && chunk.slot >= 0;
    if (is_chunk) chunk.num_keys = a.positions[chunk.first_row + chunk.num_rows - 1] + 1;
    const int32_t tiles = NumKeyTiles(chunk.num_keys), tiles_up_to = WarpScan(tiles);
    const int32_t chunks_up_to = WarpScan(is_chunk ? 1 : 0);
    chunk.first_tile = num_tiles + tiles_up_to - tiles;
    if (is_chunk) plan->chunks[num_chunks + chunks_up_to - 1] = chunk;
    num_tiles += __shfl_sync(0xffffffffu, tiles_up_to, kWarpSize - 1);
    num_chunks += __shfl_sync(0xffffffffu, chunks_up_to, kWarpSize - 1);
  }
  if (lane != 0) return;
  plan->num_chunks = num_chunks;
  plan->num_tiles = num_tiles;
}

constexpr int kRopeThreads = kRopeDim / kChunk;  // of a row and head: each has four pairs

// From the first chunk's first row on. Rows without a slot give zeros.
__global__ void __launch_bounds__(256) RopeChunks(const PrefillArguments a) {
  constexpr int kHeadDim = kPrefillNopeDim + kRopeDim;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (256 / kRopeThreads) + threadIdx.x / kRopeThreads;
  const int piece = threadIdx.x % kRopeThreads;
  const int64_t t = a.long_chunks.first_row + row / a.num_heads, h = row % a.num_heads;
  if (t >= a.num_tokens) return;
  const bf16* q = static_cast<const bf16*>(a.q.data) + t * a.q.row_stride + h * kHeadDim + kPrefillNopeDim;
  const auto* angles = reinterpret_cast<const float4*>(a.cos_sin + static_cast<int64_t>(a.positions[t]) * kRopeDim);
  float v[kChunk];
  UnpackBf16(reinterpret_cast<const uint4*>(q)[piece], v);
  const float4 cosines = __ldg(angles + piece), sines = __ldg(angles + kRopeThreads + piece);
  const float cosine[4] = {cosines.x, cosines.y, cosines.z, cosines.w}, sine[4] = {sines.x, sines.y, sines.z, sines.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = v[2 * i], y = v[2 * i + 1];
    v[2 * i] = x * cosine[i] - y * sine[i];
    v[2 * i + 1] = x * sine[i] + y * cosine[i];
  }
  static_cast<uint4*>(a.q_rope)[(t * a.num_heads + h) * kRopeThreads + piece] = PackBf16(v);
  if (a.slots[t] >= 0) return;
  const MatrixRef& out = a.out.values;
  const bool is_fp8 = out.type == NumberType::kE4M3;
  const int64_t piece_bytes = kPrefillValueDim / kRopeThreads * (is_fp8 ? 1 : 2);
  auto* zeros = reinterpret_cast<uint4*>(static_cast<uint8_t*>(out.data) + t * out.row_stride * (is_fp8 ? 1 : 2) +
                                         (h * kRopeThreads + piece) * piece_bytes);
  zeros[0] = {};
  if (!is_fp8) zeros[1] = {};
  if (is_fp8 && piece == 0) a.out.scales[t * a.out.scale_stride + h] = QuantScale(0, a.out.is_ue8m0);
}

// ---- Latents.

// The chunk that a key tile belongs to.
__device__ const Chunk& ChunkOf(const PrefillPlan& plan, int32_t tile) {
  int32_t low = 0, high = plan.num_chunks;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (plan.chunks[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return plan.chunks[low];
}

constexpr int kPageTokens = 64, kGatherThreads = 256, kGatherKeys = 16;

// 8 values of the fp8 cache as bf16.
__device__ __forceinline__ uint4 WidenFp8(uint2 packed, float scale) {
  const uint32_t words[2] = {packed.x, packed.y};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pair = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    const float2 two = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    out[i] = PackBf16(two.x * scale, two.y * scale);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// A block 16 keys of the window, by 16 bytes of what comes out; zeros where the sequence has no key.
template <bool kFp8>
__global__ void __launch_bounds__(kGatherThreads) GatherLatents(const PrefillArguments a, int32_t first_tile) {
  auto* plan = static_cast<PrefillPlan*>(a.plan);
  if (blockIdx.x == 0 && threadIdx.x == 0) plan->next_item = 0;
  constexpr int kTileBlocks = kPrefillKeyTile / kGatherKeys;
  const int32_t tile = first_tile + static_cast<int32_t>(blockIdx.x) / kTileBlocks;
  if (tile >= plan->num_tiles) return;
  const Chunk chunk = ChunkOf(*plan, tile);
  const int32_t position =
      (tile - chunk.first_tile) * kPrefillKeyTile + static_cast<int32_t>(blockIdx.x) % kTileBlocks * kGatherKeys;
  const int32_t num_keys = min(kGatherKeys, chunk.num_keys - position);
  const uint8_t* entries = a.cache;
  if (num_keys > 0) {
    const int32_t page = a.block_table[chunk.slot * a.table_stride + position / kPageTokens];
    entries += (static_cast<int64_t>(page) * kPageTokens + position % kPageTokens) * a.token_bytes;
  }
  constexpr int kLatentChunks = kLatentDim / 8, kChunks = (kLatentDim + kRopeDim) / 8;
  constexpr int kRopeBytes = kFp8 ? kLatentDim + kLatentDim / kScaleGroup * 4 : kLatentDim * 2;
  const int64_t first_key = static_cast<int64_t>(blockIdx.x) * kGatherKeys;
#pragma unroll
  for (int i = threadIdx.x; i < kGatherKeys * kChunks; i += kGatherThreads) {
    const int key = i / kChunks, column = i % kChunks;
    uint4 value = {};
    if (key < num_keys) {
      const uint8_t* entry = entries + key * a.token_bytes;
      if (column >= kLatentChunks) {
        value = __ldg(reinterpret_cast<const uint4*>(entry + kRopeBytes) + column - kLatentChunks);
      } else if constexpr (kFp8) {
        const float scale = reinterpret_cast<const float*>(entry + kLatentDim)[column * 8 / kScaleGroup];
        value = WidenFp8(__ldg(reinterpret_cast<const uint2*>(entry) + column), scale);
      } else {
        value = __ldg(reinterpret_cast<const uint4*>(entry) + column);
      }
    }
    if (column < kLatentChunks) {
      static_cast<uint4*>(a.latents)[(first_key + key) * kLatentChunks + column] = value;
    } else {
      static_cast<uint4*>(a.k_rope)[(first_key + key) * (kRopeDim / 8) + column - kLatentChunks] = value;
    }
  }
}

// ---- Their product with W_UK and W_UV.

constexpr int kGroupThreads = 128, kConsumers = 2 * kGroupThreads, kThreads = kConsumers + kGroupThreads;
constexpr int kGroupWarps = 4;
constexpr int kItemHeads = 4;                 // that a block takes past its latents before it takes other ones
constexpr int kInnerSteps = kLatentDim / 64;  // of 64 latents' columns
constexpr int kStages = 6;                    // of a weight's columns
constexpr int kTurnBarrier = 1;               // and 2: of either warpgroup

struct ExpandShared {
  uint8_t latents[kInnerSteps][kBoxBytes];
  uint8_t weights[kStages][kBoxBytes];
  uint64_t latents_full[kInnerSteps], latents_empty[kInnerSteps], full[kStages], empty[kStages];
};

struct Ring {
  int stage = 0;
  uint32_t round = 0;
  __device__ void Next(int count = 1) {
    stage += count;
    if (stage < kStages) return;
    stage -= kStages;
    round ^= 1;
  }
};

struct ExpandItem {
  int32_t tile, first_head, num_heads;
};

// Neighbours in order have the same heads.
__device__ __forceinline__ ExpandItem ExpandItemAt(int32_t index, int32_t num_tiles, int32_t num_heads) {
  const int32_t group = index / num_tiles;
  return {index - group * num_tiles, group * kItemHeads, min(kItemHeads, num_heads - group * kItemHeads)};
}

struct ExpandMaps {
  CUtensorMap latents, w_uk, w_uv;
};

__device__ __forceinline__ void ProduceExpansion(const ExpandMaps& maps, ExpandShared& sh, int32_t num_items,
                                                 int32_t num_tiles, int32_t num_heads) {
  Ring ring;
  uint32_t round = 0;  // of the latents
  for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x, round ^= 1) {
    const ExpandItem item = ExpandItemAt(index, num_tiles, num_heads);
    for (int32_t unit = 0; unit < 2 * item.num_heads; ++unit) {
      const int32_t head = item.first_head + unit / 2;
      for (int step = 0; step < kInnerSteps; ++step) {
        if (unit == 0) {
          const uint32_t full = SharedAddress(&sh.latents_full[step]);
          BarrierWait(SharedAddress(&sh.latents_empty[step]), round ^ 1);
          BarrierExpect(full, kBoxBytes);
          CopyTile(SharedAddress(sh.latents[step]), &maps.latents, full, 64 * step, kPrefillKeyTile * item.tile);
        }
        const uint32_t full = SharedAddress(&sh.full[ring.stage]), dst = SharedAddress(sh.weights[ring.stage]);
        BarrierWait(SharedAddress(&sh.empty[ring.stage]), ring.round ^ 1);
        BarrierExpect(full, kBoxBytes);
        if (unit % 2 == 0) {
          CopyTile(dst, &maps.w_uk, full, 0, 64 * step, head);
          CopyTile(dst + kBoxBytes / 2, &maps.w_uk, full, 64, 64 * step, head);
        } else {
          CopyTile(dst, &maps.w_uv, full, 64 * step, 0, head);
        }
        ring.Next();
      }
    }
  }
}

// Rows 16 * warp + lane / 4 + 8 i of 64.
__device__ __forceinline__ void StoreExpansion(bf16* out, const float (&d)[64]) {
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x % kGroupThreads / kWarpSize * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t words[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) words[j] = PackBf16(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
    GatherColumns(words);
    auto* to = reinterpret_cast<uint4*>(out + (row + 8 * i) * 128) + lane % 4;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      to[4 * g] = make_uint4(words[4 * g], words[4 * g + 1], words[4 * g + 2], words[4 * g + 3]);
    }
  }
}

// Warpgroup 0 makes keys, 1 values: 128 latents by 128 columns of a head.
template <bool kIsKeys>
__device__ __forceinline__ void ConsumeExpansion(const PrefillArguments& a, ExpandShared& sh, int32_t num_items,
                                                 int32_t num_tiles) {
  constexpr int kGroup = kIsKeys ? 0 : 1;
  const bool is_first_lane = threadIdx.x % kWarpSize == 0;
  Ring ring;
  if (!kIsKeys) {
    ring.Next(kInnerSteps);
    ArriveThreads(kTurnBarrier, kConsumers);
  }
  uint32_t round = 0;
  for (int32_t index = blockIdx.x; index < num_items; index += gridDim.x, round ^= 1) {
    const ExpandItem item = ExpandItemAt(index, num_tiles, a.num_heads);
    for (int32_t h = 0; h < item.num_heads; ++h) {
      float low[64], high[64];
      int before = 0;
      SyncThreads(kTurnBarrier + kGroup, kConsumers);
#pragma unroll
      for (int step = 0; step < kInnerSteps; ++step) {
        if (h == 0) BarrierWait(SharedAddress(&sh.latents_full[step]), round);
        BarrierWait(SharedAddress(&sh.full[ring.stage]), ring.round);
        __syncwarp();
        const uint64_t x = KMajorDescriptor(SharedAddress(sh.latents[step]));
        const uint32_t weights = SharedAddress(sh.weights[ring.stage]);
        const uint64_t w = kIsKeys ? MnMajorDescriptor(weights, kBoxBytes / 2) : KMajorDescriptor(weights);
        WgmmaFence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint64_t at = x + 2 * k, below = at + kBoxBytes / 2 / 16;
          if constexpr (kIsKeys) {
            WgmmaBf16Transposed<128>(low, at, w + 128 * k, step + k > 0);
            WgmmaBf16Transposed<128>(high, below, w + 128 * k, step + k > 0);
          } else {
            WgmmaBf16<128>(low, at, w + 2 * k, step + k > 0);
            WgmmaBf16<128>(high, below, w + 2 * k, step + k > 0);
          }
        }
        WgmmaCommit();
        if (step > 0) {
          WgmmaWait<1>();
          if (is_first_lane) {
            BarrierArrive(SharedAddress(&sh.empty[before]));
            if (h + 1 == item.num_heads) BarrierArrive(SharedAddress(&sh.latents_empty[step - 1]));
          }
        }
        before = ring.stage;
        ring.Next();
      }
      ArriveThreads(kTurnBarrier + 1 - kGroup, kConsumers);
      WgmmaWait<0>();
      WgmmaKeep(low);
      WgmmaKeep(high);
      if (is_first_lane) {
        BarrierArrive(SharedAddress(&sh.empty[before]));
        if (h + 1 == item.num_heads) BarrierArrive(SharedAddress(&sh.latents_empty[kInnerSteps - 1]));
      }
      ring.Next(kInnerSteps % kStages);
      if (kInnerSteps / kStages % 2 == 1) ring.round ^= 1;
      bf16* out = static_cast<bf16*>(kIsKeys ? a.keys : a.values) +
                  (static_cast<int64_t>(item.first_head + h) * a.window_tiles + item.tile) * kPrefillKeyTile * 128;
      StoreExpansion(out, low);
      StoreExpansion(out + 64 * 128, high);
    }
  }
  // NOTE: the turn that nobody takes any more.
  if (kIsKeys) SyncThreads(kTurnBarrier, kConsumers);
}

__global__ void __launch_bounds__(kThreads, 1)
    ExpandLatents(const __grid_constant__ ExpandMaps maps, const PrefillArguments a, int32_t first_tile) {
  extern __shared__ __align__(1024) uint8_t memory[];
  ExpandShared& sh = *reinterpret_cast<ExpandShared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kInnerSteps; ++i) {
      BarrierInit(SharedAddress(&sh.latents_full[i]), 1);
      BarrierInit(SharedAddress(&sh.latents_empty[i]), 2 * kGroupWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(SharedAddress(&sh.full[i]), 1);
      BarrierInit(SharedAddress(&sh.empty[i]), kGroupWarps);
    }
    BarrierInitDone();
  }
  __syncthreads();
  const int32_t num_tiles = min(a.window_tiles, static_cast<PrefillPlan*>(a.plan)->num_tiles - first_tile);
  const int32_t num_items = max(num_tiles, 0) * ((a.num_heads + kItemHeads - 1) / kItemHeads);
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  if (group == 2) {
    FewerRegisters<40>();
    if (threadIdx.x == kConsumers) ProduceExpansion(maps, sh, num_items, num_tiles, a.num_heads);
  } else if (group == 0) {
    MoreRegisters<232>();
    ConsumeExpansion<true>(a, sh, num_items, num_tiles);
  } else {
    MoreRegisters<232>();
    ConsumeExpansion<false>(a, sh, num_items, num_tiles);
  }
}

}  // namespace

size_t PlacePrefillWorkspace(void* memory, int max_tokens, int max_sequences, int num_heads, int window_tiles,
                             PrefillArguments* a) {
  constexpr size_t kAlignment = 256;
  const size_t rows = static_cast<size_t>(max_tokens) * num_heads;
  const size_t keys = static_cast<size_t>(window_tiles) * kPrefillKeyTile;
  size_t bytes = 0;
  const auto take = [&](size_t size) {
    void* part = static_cast<uint8_t*>(memory) + bytes;
    bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  };
  a->window_tiles = window_tiles;
  a->plan = take(sizeof(PrefillPlan) + max_sequences * sizeof(Chunk));
  a->q_rope = take(rows * kRopeDim * sizeof(bf16));
  a->latents = take(keys * kLatentDim * sizeof(bf16));
  a->k_rope = take(keys * kRopeDim * sizeof(bf16));
  a->keys = take(keys * num_heads * kPrefillNopeDim * sizeof(bf16));
  a->values = take(keys * num_heads * kPrefillValueDim * sizeof(bf16));
  a->results = static_cast<float*>(take(rows * kPrefillValueDim * sizeof(float)));
  a->weights = static_cast<float*>(take(rows * 2 * sizeof(float)));
  return bytes;
}

void LaunchPlanPrefill(cudaStream_t stream, const PrefillArguments& a) { PlanPrefill<<<1, kWarpSize, 0, stream>>>(a); }

void LaunchRopeChunks(cudaStream_t stream, const PrefillArguments& a) {
  constexpr int kBlockRows = 256 / kRopeThreads;
  const int64_t rows = static_cast<int64_t>(a.num_tokens - a.long_chunks.first_row) * a.num_heads;
  RopeChunks<<<static_cast<unsigned>((rows + kBlockRows - 1) / kBlockRows), 256, 0, stream>>>(a);
}

void LaunchGatherLatents(cudaStream_t stream, const PrefillArguments& a, int pass) {
  const int first_tile = pass * a.window_tiles;
  const int tiles = std::min(static_cast<int>(a.long_chunks.num_keys / kPrefillKeyTile) - first_tile, a.window_tiles);
  const auto blocks = static_cast<unsigned>(tiles * (kPrefillKeyTile / kGatherKeys));
  if (a.is_fp8) {
    GatherLatents<true><<<blocks, kGatherThreads, 0, stream>>>(a, first_tile);
  } else {
    GatherLatents<false><<<blocks, kGatherThreads, 0, stream>>>(a, first_tile);
  }
}

cudaError_t PrepareExpandLatents() {
  return cudaFuncSetAttribute(ExpandLatents, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(ExpandShared));
}

bool LaunchExpandLatents(cudaStream_t stream, const PrefillArguments& a, int pass) {
  ExpandMaps maps;
  const auto weight_map = [](CUtensorMap* map, const WeightRef& w, int box_rows) {
    return MakeTensorMap(map, w.data,
                         {.cols = w.cols,
                          .rows = w.rows,
                          .row_bytes = w.row_bytes,
                          .num_groups = w.num_groups,
                          .group_bytes = w.group_bytes,
                          .box_rows = box_rows});
  };
  if (!weight_map(&maps.w_uk, a.w_uk, 64) || !weight_map(&maps.w_uv, a.w_uv, kPrefillValueDim) ||
      !MakeTensorMap(&maps.latents, a.latents,
                     {.cols = kLatentDim,
                      .rows = static_cast<int64_t>(a.window_tiles) * kPrefillKeyTile,
                      .row_bytes = kLatentDim * 2,
                      .box_rows = kPrefillKeyTile})) {
    return false;
  }
  ExpandLatents<<<a.num_sms, kThreads, sizeof(ExpandShared), stream>>>(maps, a, pass * a.window_tiles);
  return true;
}

}  // namespace cachalot
