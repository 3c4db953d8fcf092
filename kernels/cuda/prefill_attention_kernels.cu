// Attention of long prefill chunks over keys and values of every head. A block takes tiles of 128 rows of one head, two
// warpgroups 64 rows each, past tiles of 128 keys that a third one brings: while tensor cores add one tile's values,
// the next one's scores become probabilities.
#include "kernels/cuda/prefill_plan.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/exponential.h"

namespace cachalot {
namespace {

constexpr int kGroupThreads = 128, kConsumers = 2 * kGroupThreads, kThreads = kConsumers + kGroupThreads;
constexpr int kConsumerWarps = kConsumers / kWarpSize, kGroupRows = kQueryTile / 2;
constexpr int kHeadDim = kPrefillNopeDim + kRopeDim;
constexpr int kKeyBoxes = kHeadDim / 64, kValueBoxes = kPrefillValueDim / 64;
constexpr int kStages = 2, kItemSlots = 2;
constexpr int kTurnBarrier = 1;  // and 2: of either warpgroup

// A tile of rows and one head's keys that they see, within the window.
struct Item {
  int32_t first_row, num_rows;  // none: there are no more items
  int32_t head;
  int32_t first_tile, num_tiles;  // of the window
  int32_t first_key;              // position of the first tile's
  int32_t first_position;         // of the rows, which follow each other
  bool is_first, is_last;         // pass that these rows take part in
};

struct Shared {
  uint8_t q[kKeyBoxes * kBoxBytes];
  uint8_t k[kStages][kKeyBoxes * kBoxBytes];
  uint8_t v[kStages][kValueBoxes * kBoxBytes];
  Item items[kItemSlots];
  uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t item_full[kItemSlots], item_empty[kItemSlots];
};
static_assert(sizeof(Shared) <= 227 * 1024);

// A place in a ring of slots with a pair of barriers each, and how often it went round.
template <int kSlots>
struct Place {
  int slot = 0;
  uint32_t round = 0;
  __device__ void Next() {
    if (++slot < kSlots) return;
    slot = 0;
    round ^= 1;
  }
};

__device__ __forceinline__ void ArriveWarp(const uint64_t& barrier) {
  if (threadIdx.x % kWarpSize == 0) BarrierArrive(SharedAddress(&barrier));
}

// ---- What is next, and its tiles: one thread.

struct Maps {
  CUtensorMap q, q_rope, keys, k_rope, values;
};

// Goes through a pass's items in their order: chunk by chunk; of a chunk as many heads together as the second-level
// cache holds keys and values of; of these the last rows first, which see the most keys.
struct ItemCursor {
  static constexpr int32_t kCachedTiles = (24 << 20) / (kPrefillKeyTile * (kPrefillNopeDim + kPrefillValueDim) * 2);
  const PrefillArguments& a;
  const PrefillPlan& plan;
  const int32_t window_begin, window_end;
  int32_t chunk_idx = 0, first_item = 0;  // of the chunk

  // False where the item's rows see no key of the window.
  __device__ bool At(int32_t index, Item* item) {
    for (; chunk_idx < plan.num_chunks; ++chunk_idx) {
      const Chunk chunk = plan.chunks[chunk_idx];
      const int32_t begin = max(chunk.first_tile, window_begin);
      const int32_t end = min(chunk.first_tile + NumKeyTiles(chunk.num_keys), window_end);
      if (begin >= end) continue;
      const int32_t num_tiles = (chunk.num_rows + kQueryTile - 1) / kQueryTile;
      if (index >= first_item + num_tiles * a.num_heads) {
        first_item += num_tiles * a.num_heads;
        continue;
      }
      const int32_t heads = max(1, min(kCachedTiles / (end - begin), a.num_heads));
      const int32_t rest = index - first_item, group = rest / (num_tiles * heads);
      const int32_t group_heads = min(heads, a.num_heads - group * heads), inner = rest - group * num_tiles * heads;
      const int32_t tile = num_tiles - 1 - inner / group_heads,
                    rows = min(chunk.num_rows - tile * kQueryTile, kQueryTile);
      item->first_row = chunk.first_row + tile * kQueryTile;
      item->num_rows = rows;
      item->head = group * heads + inner % group_heads;
      item->first_position = chunk.num_keys - chunk.num_rows + tile * kQueryTile;
      const int32_t seen = chunk.first_tile + NumKeyTiles(item->first_position + rows);
      item->first_tile = begin - window_begin;
      item->num_tiles = min(seen, end) - begin;
      item->first_key = (begin - chunk.first_tile) * kPrefillKeyTile;
      item->is_first = begin == chunk.first_tile;
      item->is_last = seen <= end;
      return item->num_tiles > 0;
    }
    item->num_rows = 0;
    return true;
  }
};

__device__ __forceinline__ void Produce(const PrefillArguments& a, const Maps& maps, Shared& sh, int32_t window_begin) {
  auto& plan = *static_cast<PrefillPlan*>(a.plan);
  ItemCursor cursor{a, plan, window_begin, window_begin + a.window_tiles};
  Place<kItemSlots> slot;
  Place<kStages> stage;
  for (uint32_t round = 0;;) {
    Item item;
    if (!cursor.At(atomicAdd(&plan.next_item, 1), &item)) continue;
    BarrierWait(SharedAddress(&sh.item_empty[slot.slot]), slot.round ^ 1);
    sh.items[slot.slot] = item;
    BarrierArrive(SharedAddress(&sh.item_full[slot.slot]));
    slot.Next();
    if (item.num_rows == 0) return;
    BarrierWait(SharedAddress(&sh.q_empty), round ^ 1);
    round ^= 1;
    const uint32_t q_full = SharedAddress(&sh.q_full), q = SharedAddress(sh.q);
    BarrierExpect(q_full, sizeof(sh.q));
    CopyTile(q, &maps.q, q_full, item.head * kHeadDim, item.first_row);
    CopyTile(q + kBoxBytes, &maps.q, q_full, item.head * kHeadDim + 64, item.first_row);
    CopyTile(q + 2 * kBoxBytes, &maps.q_rope, q_full, item.head * kRopeDim, item.first_row);
    for (int32_t i = item.num_tiles - 1; i >= 0; --i, stage.Next()) {
      const int32_t key = (item.first_tile + i) * kPrefillKeyTile;
      const uint32_t k_full = SharedAddress(&sh.k_full[stage.slot]), k = SharedAddress(sh.k[stage.slot]);
      BarrierWait(SharedAddress(&sh.k_empty[stage.slot]), stage.round ^ 1);
      BarrierExpect(k_full, sizeof(sh.k[0]));
      CopyTile(k, &maps.keys, k_full, 0, key, item.head);
      CopyTile(k + kBoxBytes, &maps.keys, k_full, 64, key, item.head);
      CopyTile(k + 2 * kBoxBytes, &maps.k_rope, k_full, 0, key);
      const uint32_t v_full = SharedAddress(&sh.v_full[stage.slot]), v = SharedAddress(sh.v[stage.slot]);
      BarrierWait(SharedAddress(&sh.v_empty[stage.slot]), stage.round ^ 1);
      BarrierExpect(v_full, sizeof(sh.v[0]));
      CopyTile(v, &maps.values, v_full, 0, key, item.head);
      CopyTile(v + kBoxBytes, &maps.values, v_full, 64, key, item.head);
    }
  }
}

// ---- Attention: a warpgroup's 64 rows, of which a thread has two.

struct Rows {
  int32_t last_key[2];  // relative to the item's first; below 0: none
  int32_t last_clear;   // the last key that every row of the warp sees
  float max[2];         // GrownMax of the scores so far, in the log2 domain
  float sum[2];         // this thread's share
};

__device__ __forceinline__ void QueryKeys(const Shared& sh, int group, int stage, float (&s)[64]) {
  const uint64_t q = KMajorDescriptor(SharedAddress(sh.q) + group * (kBoxBytes / 2));
  const uint64_t k = KMajorDescriptor(SharedAddress(sh.k[stage]));
  WgmmaFence();
#pragma unroll
  for (int box = 0; box < kKeyBoxes; ++box) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int offset = box * (kBoxBytes / 16) + 2 * step;
      WgmmaBf16<128>(s, q + offset, k + offset, box + step > 0);
    }
  }
  WgmmaCommit();
}

__device__ __forceinline__ void AddValues(const Shared& sh, int stage, const uint32_t (&p)[32], float (&o)[64]) {
  const uint64_t v = MnMajorDescriptor(SharedAddress(sh.v[stage]), kBoxBytes);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kPrefillKeyTile / 16; ++step) {
    WgmmaRegisters(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], v + 128 * step);
  }
  WgmmaCommit();
}

// Scores of a tile become exp2(score * scale - max); by how much what the rows had before shrinks.
__device__ __forceinline__ void Weigh(int32_t first_key, float scale, float (&s)[64], Rows& rows, float (&shrink)[2]) {
  const int column = 2 * static_cast<int>(threadIdx.x % 4);
  if (first_key + kPrefillKeyTile - 1 > rows.last_clear) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (first_key + i / 4 * 8 + column + i % 2 > rows.last_key[i / 2 % 2]) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max0 = s[2 * i], max1 = s[2 * i + 1];
#pragma unroll
    for (int j = 1; j < 16; ++j) {
      max0 = fmaxf(max0, s[4 * j + 2 * i]);
      max1 = fmaxf(max1, s[4 * j + 2 * i + 1]);
    }
    float max = fmaxf(max0, max1);
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    const float before = rows.max[i];
    rows.max[i] = GrownMax(before, max * scale);
    const float base = rows.max[i] == -INFINITY ? 0.0f : rows.max[i];  // no key seen yet
    shrink[i] = FastExp2(before - base);
    float sum0 = 0, sum1 = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float& p0 = s[4 * j + 2 * i];
      float& p1 = s[4 * j + 2 * i + 1];
      p0 = FastExp2(fmaf(p0, scale, -base));
      p1 = FastExp2(fmaf(p1, scale, -base));
      sum0 += p0;
      sum1 += p1;
    }
    rows.sum[i] = fmaf(rows.sum[i], shrink[i], sum0 + sum1);
  }
}

// Probabilities as WgmmaRegisters takes them.
__device__ __forceinline__ void Pack(const float (&s)[64], uint32_t (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = PackBf16(s[2 * i], s[2 * i + 1]);
}

// Most of the time there is nothing to do: GrownMax.
__device__ __forceinline__ void Scale(const float (&factor)[2], float (&o)[64]) {
  if (__all_sync(0xffffffffu, factor[0] == 1 && factor[1] == 1)) return;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      o[4 * j + 2 * i] *= factor[i];
      o[4 * j + 2 * i + 1] *= factor[i];
    }
  }
}

// ---- The beginning and end of an item.

__device__ __forceinline__ void Begin(const PrefillArguments& a, const Item& item, int row, Rows& rows,
                                      float (&o)[64]) {
  const int column = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    const bool is_there = r < item.num_rows;
    rows.last_key[i] = is_there ? item.first_position + r - item.first_key : -1;
    rows.max[i] = -INFINITY;
    rows.sum[i] = 0;
    const int64_t at = static_cast<int64_t>(item.first_row + r) * a.num_heads + item.head;
    const bool goes_on = is_there && !item.is_first;
    if (goes_on) {
      rows.max[i] = a.weights[2 * at];
      if (threadIdx.x % 4 == 0) rows.sum[i] = a.weights[2 * at + 1];
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float2 value = make_float2(0, 0);
      if (goes_on) value = *reinterpret_cast<const float2*>(a.results + at * kPrefillValueDim + 8 * j + column);
      o[4 * j + 2 * i] = value.x;
      o[4 * j + 2 * i + 1] = value.y;
    }
  }
  rows.last_clear = __reduce_min_sync(0xffffffffu, min(rows.last_key[0], rows.last_key[1]));
}

// A row's group of 128 as fp8: this thread has the columns of GatherColumns.
__device__ __forceinline__ void StoreFp8(const ActivationRef& out, int64_t t, int head, const uint32_t (&words)[16],
                                         bool is_there) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(words);
  float amax = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 two = __bfloat1622float2(pairs[i]);
    amax = fmaxf(amax, fmaxf(fabsf(two.x), fabsf(two.y)));
  }
  amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
  amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
  if (!is_there) return;
  const float scale = QuantScale(amax, out.is_ue8m0), inverse = 1.0f / scale;
  const int lane = threadIdx.x % 4;
  auto* to = reinterpret_cast<uint2*>(static_cast<uint8_t*>(out.values.data) + t * out.values.row_stride +
                                      head * kPrefillValueDim) +
             lane;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    uint32_t packed[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 low = __bfloat1622float2(pairs[4 * g + 2 * half]),
                   high = __bfloat1622float2(pairs[4 * g + 2 * half + 1]);
      packed[half] = PackE4m3(low.x * inverse, low.y * inverse, high.x * inverse, high.y * inverse);
    }
    to[4 * g] = make_uint2(packed[0], packed[1]);
  }
  if (lane == 0) out.scales[t * out.scale_stride + head] = scale;
}

__device__ __forceinline__ void End(const PrefillArguments& a, const Item& item, int row, Rows& rows, float (&o)[64]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t t = item.first_row + row + 8 * i;
    const bool is_there = row + 8 * i < item.num_rows;
    rows.sum[i] += __shfl_xor_sync(0xffffffffu, rows.sum[i], 1);
    rows.sum[i] += __shfl_xor_sync(0xffffffffu, rows.sum[i], 2);
    if (!item.is_last) {
      if (!is_there) continue;
      const int64_t at = t * a.num_heads + item.head;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        *reinterpret_cast<float2*>(a.results + at * kPrefillValueDim + 8 * j + 2 * lane) =
            make_float2(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
      }
      if (lane == 0) *reinterpret_cast<float2*>(a.weights + 2 * at) = make_float2(rows.max[i], rows.sum[i]);
      continue;
    }
    const float factor = 1.0f / rows.sum[i];
    uint32_t words[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) words[j] = PackBf16(o[4 * j + 2 * i] * factor, o[4 * j + 2 * i + 1] * factor);
    GatherColumns(words);
    if (a.out.values.type == NumberType::kE4M3) {
      StoreFp8(a.out, t, item.head, words, is_there);
    } else if (is_there) {
      auto* to = reinterpret_cast<uint4*>(static_cast<bf16*>(a.out.values.data) + t * a.out.values.row_stride +
                                          item.head * kPrefillValueDim) +
                 lane;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        to[4 * g] = make_uint4(words[4 * g], words[4 * g + 1], words[4 * g + 2], words[4 * g + 3]);
      }
    }
  }
}

// The two warpgroups take turns at the tensor cores.
__device__ __forceinline__ void TakeTurn(int group) { SyncThreads(kTurnBarrier + group, kConsumers); }
__device__ __forceinline__ void PassTurn(int group) { ArriveThreads(kTurnBarrier + 1 - group, kConsumers); }

__device__ __forceinline__ void Attend(const PrefillArguments& a, const Item& item, Shared& sh, int group, int row,
                                       uint32_t q_round, Place<kStages>& stage) {
  const float scale = a.softmax_scale * kLog2E;
  float s[64], o[64], shrink[2];
  uint32_t p[32];
  Rows rows;
  Begin(a, item, row, rows, o);
  BarrierWait(SharedAddress(&sh.q_full), q_round);
  BarrierWait(SharedAddress(&sh.k_full[stage.slot]), stage.round);
  __syncwarp();
  TakeTurn(group);
  QueryKeys(sh, group, stage.slot, s);
  PassTurn(group);
  WgmmaWait<0>();
  WgmmaKeep(s);
  ArriveWarp(sh.k_empty[stage.slot]);
  int32_t key = (item.num_tiles - 1) * kPrefillKeyTile;
  Weigh(key, scale, s, rows, shrink);
  Scale(shrink, o);
  Pack(s, p);
  while (key > 0) {
    key -= kPrefillKeyTile;
    const Place<kStages> before = stage;
    stage.Next();
    BarrierWait(SharedAddress(&sh.k_full[stage.slot]), stage.round);
    BarrierWait(SharedAddress(&sh.v_full[before.slot]), before.round);
    __syncwarp();
    TakeTurn(group);
    QueryKeys(sh, group, stage.slot, s);
    AddValues(sh, before.slot, p, o);
    PassTurn(group);
    WgmmaWait<1>();
    WgmmaKeep(s);
    ArriveWarp(sh.k_empty[stage.slot]);
    Weigh(key, scale, s, rows, shrink);
    // NOTE: no sum is negative, but a branch that needs all of them keeps the assembler from waiting before it weighs.
    if (fminf(rows.sum[0], rows.sum[1]) < 0) __trap();
    WgmmaWait<0>();
    WgmmaKeep(o);
#pragma unroll
    for (uint32_t& word : p) asm volatile("" : "+r"(word)::"memory");
    ArriveWarp(sh.v_empty[before.slot]);
    Scale(shrink, o);
    Pack(s, p);
  }
  ArriveWarp(sh.q_empty);
  BarrierWait(SharedAddress(&sh.v_full[stage.slot]), stage.round);
  __syncwarp();
  TakeTurn(group);
  AddValues(sh, stage.slot, p, o);
  PassTurn(group);
  WgmmaWait<0>();
  WgmmaKeep(o);
  ArriveWarp(sh.v_empty[stage.slot]);
  stage.Next();
  End(a, item, row, rows, o);
}

__device__ __forceinline__ void Consume(const PrefillArguments& a, Shared& sh, int group) {
  const int row = group * kGroupRows + static_cast<int>(threadIdx.x) % kGroupThreads / kWarpSize * 16 +
                  static_cast<int>(threadIdx.x) % kWarpSize / 4;
  Place<kItemSlots> slot;
  Place<kStages> stage;
  if (group == 1) PassTurn(group);
  for (uint32_t q_round = 0;; q_round ^= 1) {
    BarrierWait(SharedAddress(&sh.item_full[slot.slot]), slot.round);
    const Item item = sh.items[slot.slot];
    __syncwarp();
    ArriveWarp(sh.item_empty[slot.slot]);
    slot.Next();
    if (item.num_rows == 0) break;
    Attend(a, item, sh, group, row, q_round, stage);
  }
  if (group == 0) TakeTurn(group);  // NOTE: the one that nobody takes any more
}

__global__ void __launch_bounds__(kThreads, 1)
    AttendChunks(const __grid_constant__ Maps maps, const __grid_constant__ PrefillArguments a, int32_t window_begin) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    BarrierInit(SharedAddress(&sh.q_full), 1);
    BarrierInit(SharedAddress(&sh.q_empty), kConsumerWarps);
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(SharedAddress(&sh.k_full[i]), 1);
      BarrierInit(SharedAddress(&sh.v_full[i]), 1);
      BarrierInit(SharedAddress(&sh.k_empty[i]), kConsumerWarps);
      BarrierInit(SharedAddress(&sh.v_empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < kItemSlots; ++i) {
      BarrierInit(SharedAddress(&sh.item_full[i]), 1);
      BarrierInit(SharedAddress(&sh.item_empty[i]), kConsumerWarps);
    }
    BarrierInitDone();
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  if (group == 2) {
    FewerRegisters<40>();
    if (threadIdx.x == kConsumers) Produce(a, maps, sh, window_begin);
  } else {
    MoreRegisters<232>();
    Consume(a, sh, group);
  }
}

bool Aligned16(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}

}  // namespace

bool CanPrefill(const PrefillArguments& a) {
  const bool is_fp8 = a.out.values.type == NumberType::kE4M3, is_bf16 = a.out.values.type == NumberType::kBF16;
  return (is_fp8 || is_bf16) && a.q.type == NumberType::kBF16 && Aligned16(a.q.data, a.q.row_stride * 2) &&
         Aligned16(a.out.values.data, a.out.values.row_stride * (is_fp8 ? 1 : 2));
}

bool LaunchAttendChunks(cudaStream_t stream, const PrefillArguments& a, int pass) {
  const int64_t window = static_cast<int64_t>(a.window_tiles) * kPrefillKeyTile, heads = a.num_heads;
  const auto rows_map = [](CUtensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_bytes) {
    return MakeTensorMap(map, data, {.cols = cols, .rows = rows, .row_bytes = row_bytes, .box_rows = 128});
  };
  const auto head_map = [&](CUtensorMap* map, const void* data) {
    return MakeTensorMap(map, data,
                         {.cols = 128,
                          .rows = window,
                          .row_bytes = 256,
                          .num_groups = heads,
                          .group_bytes = window * 256,
                          .box_rows = kPrefillKeyTile});
  };
  Maps maps;
  if (!rows_map(&maps.q, a.q.data, a.num_tokens, heads * kHeadDim, a.q.row_stride * 2) ||
      !rows_map(&maps.q_rope, a.q_rope, a.num_tokens, heads * kRopeDim, heads * kRopeDim * 2) ||
      !rows_map(&maps.k_rope, a.k_rope, window, kRopeDim, kRopeDim * 2) || !head_map(&maps.keys, a.keys) ||
      !head_map(&maps.values, a.values)) {
    return false;
  }
  AttendChunks<<<a.num_sms, kThreads, sizeof(Shared), stream>>>(maps, a, pass * a.window_tiles);
  return true;
}

cudaError_t PreparePrefillAttention() {
  const cudaError_t error = PrepareExpandLatents();
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(AttendChunks, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
}

bool LaunchPrefillAttention(cudaStream_t stream, const PrefillArguments& a) {
  LaunchPlanPrefill(stream, a);
  LaunchRopeChunks(stream, a);
  for (int pass = 0; pass * static_cast<int64_t>(a.window_tiles) * kPrefillKeyTile < a.long_chunks.num_keys; ++pass) {
    LaunchGatherLatents(stream, a, pass);
    if (!LaunchExpandLatents(stream, a, pass) || !LaunchAttendChunks(stream, a, pass)) return false;
  }
  return true;
}

}  // namespace cachalot
