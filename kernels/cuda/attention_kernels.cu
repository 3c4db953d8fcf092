// MLA kernels. A block of three warpgroups, four where the cache is fp8, a work item: 64 rows of queries stay in shared
// memory, cache blocks of 64 keys go through two buffers. The last warpgroups bring them; the first makes scores and
// probabilities of even blocks, the second of odd ones, each while the other multiplies, and each multiplies all
// probabilities with its half of the 512 columns: a key's latent is also its value, so a block is loaded once.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm/instructions.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/exponential.h"

namespace cachalot {
namespace {

constexpr int kEntryDim = kLatentDim + kRopeDim;  // values of a cache entry, and of an absorbed query
constexpr int kRows = kGpuTileQueries;            // of a tile
constexpr int kGroupThreads = 128;                // of a warpgroup
constexpr int kConsumers = 2 * kGroupThreads;
// Warpgroups that bring keys: those of the fp8 cache cost more than a copy.
template <bool kFp8>
constexpr int kProducerGroups = kFp8 ? 2 : 1;
template <bool kFp8>
constexpr int kThreads = kConsumers + kProducerGroups<kFp8>* kGroupThreads;
constexpr int kSubTileBytes = kRows * 128;  // 64 rows of 64 bf16
constexpr int kSubTiles = kEntryDim / 64;
// A block goes in parts: the columns of one warpgroup, of the other, and the rotated ones.
constexpr int kParts = 3, kRopePart = 2, kPartTiles = kLatentDim / 2 / 64;
constexpr int kTileBytes = kSubTiles * kSubTileBytes;
constexpr int kRopeOffset = kLatentDim / 64 * kSubTileBytes;  // of the rotated parts

// ---- Loading.

struct Shared {
  uint8_t q[kTileBytes];
  uint8_t kv[2][kTileBytes];  // once its scores are made, probabilities take the place of a block's rotated parts
  float max[2][kRows];        // that even and odd blocks leave
  float sum[2][kRows];        // of each warpgroup, in the end
  uint64_t full[2][kParts], empty[2][kParts], scored[2], weighed[2], item_full, item_empty;
  int32_t item;
};
constexpr int kSharedBytes = sizeof(Shared);
static_assert(kSharedBytes <= 227 * 1024);

constexpr int kConsumerBarrier = 1;

// 64 rows of 576 bf16 from `src`, those from `first_row` to `end_row` there, the others zeros; by `kCount` threads,
// `thread` this one.
template <int kCount>
__device__ void LoadRows(uint32_t dst, const uint8_t* src, int64_t row_bytes, int first_row, int end_row, int thread) {
  constexpr int kChunks = kEntryDim * 2 / 16;
#pragma unroll 6
  for (int i = 0; i < kRows * kChunks / kCount; ++i) {
    const int index = i * kCount + thread, row = index / kChunks, chunk = index % kChunks;
    const bool is_there = row >= first_row && row < end_row;
    CopyAsync16(dst + chunk / 8 * kSubTileBytes + Swizzled(row, chunk % 8),
                is_there ? src + row * row_bytes + chunk * 16 : src, is_there ? 16 : 0);
  }
}

// Half a block of the fp8 cache on its way, by one warpgroup: a fourth of a key waits in a thread's registers, of every
// 64 bytes 16, until it becomes bf16. NOTE: neighbours in a warp have the same chunks of neighbouring keys, which a
// swizzled tile has in different banks.
struct Fp8Key {
  static constexpr int kTiles = kLatentDim / 64, kScales = kLatentDim / kScaleGroup;
  static constexpr int kBytes = kLatentDim + kScales * 4 + kRopeDim * 2;  // ops_types.h: KvTokenBytes
  static constexpr int kRopeBytes = kLatentDim + kScales * 4;             // before the rotated part
  uint4 values[kTiles];
  float4 scales;

  // Zeros where the key is missing. Its rotated part comes later.
  __device__ __forceinline__ void Load(const uint8_t* entry, int quarter, bool is_there) {
    const auto* from = reinterpret_cast<const uint4*>(entry) + quarter;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) values[i] = is_there ? __ldg(from + 4 * i) : make_uint4(0, 0, 0, 0);
    scales = is_there ? __ldg(reinterpret_cast<const float4*>(entry + kLatentDim)) : make_float4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void StoreTile(uint8_t* kv, int i, float scale, int key, int quarter) const {
    const uint32_t words[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t packed[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto pair = static_cast<uint16_t>(words[2 * half + w / 2] >> (w % 2 * 16));
        const float2 two = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
        const __nv_bfloat162 both = __floats2bfloat162_rn(two.x * scale, two.y * scale);
        packed[w] = *reinterpret_cast<const uint32_t*>(&both);
      }
      *reinterpret_cast<uint4*>(kv + i * kSubTileBytes + Swizzled(key, 2 * quarter + half)) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }

  // Calls begin(part) before it stores one, end(part) after.
  template <class Begin, class End>
  __device__ __forceinline__ void Store(uint8_t* kv, const uint8_t* entry, int key, int quarter, bool is_there,
                                        const Begin& begin, const End& end) const {
    const float scale[kScales] = {scales.x, scales.y, scales.z, scales.w};
    begin(0);
#pragma unroll
    for (int i = 0; i < kPartTiles; ++i) StoreTile(kv, i, scale[i / 2], key, quarter);
    end(0);
    uint4 rope[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto* from = reinterpret_cast<const uint4*>(entry + kRopeBytes) + quarter + 4 * i;
      rope[i] = is_there ? __ldg(from) : make_uint4(0, 0, 0, 0);
    }
    begin(1);
#pragma unroll
    for (int i = kPartTiles; i < kTiles; ++i) StoreTile(kv, i, scale[i / 2], key, quarter);
    end(1);
    begin(kRopePart);
#pragma unroll
    for (int i = 0; i < 2; ++i) *reinterpret_cast<uint4*>(kv + kRopeOffset + Swizzled(key, quarter + 4 * i)) = rope[i];
    end(kRopePart);
  }
};
static_assert(Fp8Key::kScales == 4 && Fp8Key::kBytes % 16 == 0);

// Whose turn a buffer is: all count its uses. A block is copied, part after part (full), its scores are made by one
// warpgroup (scored), and its probabilities are there (weighed) when both add their values (empty). NOTE: every thread
// arrives for itself, and a warpgroup that meets the other at a named barrier has none of its own: compute-sanitizer's
// racecheck loses track of either. Lanes may leave a wait one by one, and wgmma and bar.sync want whole warps: hence
// __syncwarp.
struct Buffers {
  uint32_t full, empty, scored, weighed;  // barriers
  uint32_t rounds = 0;                    // a bit each
  __device__ uint32_t Full(int b, int part) const { return full + 8 * (kParts * b + part); }
  __device__ uint32_t Empty(int b, int part) const { return empty + 8 * (kParts * b + part); }
  __device__ void WaitFull(int b, int part) const {
    BarrierWait(Full(b, part), rounds >> b & 1);
    __syncwarp();
  }
  __device__ void WaitEmpty(int b, int part) const { BarrierWait(Empty(b, part), ~rounds >> b & 1); }
  __device__ void WaitWeighed(int b) const {
    BarrierWait(weighed + 8 * b, rounds >> b & 1);
    __syncwarp();
  }
  // The warpgroup of the block's scores.
  __device__ void MeetScored(int b) const {
    BarrierArrive(scored + 8 * b);
    BarrierWait(scored + 8 * b, rounds >> b & 1);
  }
  __device__ void ArriveWeighed(int b) const { BarrierArrive(weighed + 8 * b); }
  __device__ void Next(int b) { rounds ^= 1u << b; }
};

// The producers' share of an item over the bf16 cache: blocks by TMA, or, where keys are missing, by hand.
__device__ __forceinline__ void ProduceBf16(const AttentionArguments& a, const CUtensorMap* map, const QueryTile& tile,
                                            const WorkItem& item, Shared& sh, Buffers& buffers) {
  const int thread = threadIdx.x - kConsumers;
  const uint64_t policy = StreamingPolicy();
  const int32_t* pages = a.block_table + tile.slot * a.table_stride;
  for (int32_t index = item.block_begin; index < item.block_end; ++index) {
    const int b = (index - item.block_begin) & 1, num_keys = min(kPageTokens, tile.kv_len - index * kPageTokens);
    const uint32_t dst = SharedAddress(sh.kv[b]);
    // NOTE: what nobody sees may be anything, and nothing times NaN is not nothing.
    const int first_there = index == 0 ? a.first_key : 0;
    if (num_keys < kPageTokens || first_there > 0) {
      for (int part = 0; part < kParts; ++part) buffers.WaitEmpty(b, part);
      const uint8_t* page = a.cache + pages[index] * a.token_bytes * kPageTokens;
      LoadRows<kGroupThreads>(dst, page, a.token_bytes, first_there, num_keys, thread);
      CopyAsyncCommit();
      CopyAsyncWait<0>();
      FenceProxyAsync();
      for (int part = 0; part < kParts; ++part) BarrierArrive(buffers.Full(b, part));
    } else {
      for (int part = 0; part < kParts; ++part) {
        buffers.WaitEmpty(b, part);
        const uint32_t full = buffers.Full(b, part);
        if (thread != 0) {
          BarrierArrive(full);
          continue;
        }
        const int tile_begin = part * kPartTiles, tile_end = min(tile_begin + kPartTiles, kSubTiles);
        BarrierExpect(full, (tile_end - tile_begin) * kSubTileBytes);
        for (int t = tile_begin; t < tile_end; ++t) {
          CopyTileHinted(dst + t * kSubTileBytes, map, full, 64 * t, 0, pages[index], policy);
        }
      }
    }
    buffers.Next(b);
  }
}

// The same over the fp8 cache. While consumers are busy with a block the next one comes, and the one after that as far
// as the second-level cache.
__device__ __forceinline__ void ProduceFp8(const AttentionArguments& a, const QueryTile& tile, const WorkItem& item,
                                           Shared& sh, Buffers& buffers) {
  const int thread = threadIdx.x - kConsumers, key = thread / 4, quarter = thread % 4;
  const int32_t* pages = a.block_table + tile.slot * a.table_stride;
  const auto page = [&](int32_t index) {
    return a.cache + pages[index] * static_cast<int64_t>(kPageTokens) * Fp8Key::kBytes;
  };
  const auto is_there = [&](int32_t index) {
    const int32_t own = index * kPageTokens + key;
    return own >= a.first_key && own < tile.kv_len;
  };
  Fp8Key own;
  const uint8_t* entry = page(item.block_begin) + key * Fp8Key::kBytes;
  own.Load(entry, quarter, is_there(item.block_begin));
  for (int32_t index = item.block_begin; index < item.block_end; ++index) {
    const int b = (index - item.block_begin) & 1;
    own.Store(
        sh.kv[b], entry, key, quarter, is_there(index), [&](int part) { buffers.WaitEmpty(b, part); },
        [&](int part) {
          FenceProxyAsync();
          BarrierArrive(buffers.Full(b, part));
        });
    buffers.Next(b);
    if (index + 1 == item.block_end) break;
    entry = page(index + 1) + key * Fp8Key::kBytes;
    own.Load(entry, quarter, is_there(index + 1));
    if (thread == 0 && index + 2 < item.block_end) PrefetchL2(page(index + 2), kPageTokens * Fp8Key::kBytes);
  }
}

struct RowState {
  int32_t last_key[2];  // -1: the row is beyond the tile's end
  uint32_t last_clear;  // the last key that every row of the warp sees
  float max[2];         // GrownMax of the scores so far, in the log2 domain
  float sum[2];
};

// Scores of a buffer's 64 keys, queued part after part.
__device__ __forceinline__ void QueryKeys(const Shared& sh, const Buffers& buffers, int b, float (&s)[32]) {
  const uint64_t q = KMajorDescriptor(SharedAddress(sh.q)), k = KMajorDescriptor(SharedAddress(sh.kv[b]));
#pragma unroll
  for (int tile = 0; tile < kSubTiles; ++tile) {
    if (tile % kPartTiles == 0) {
      buffers.WaitFull(b, tile / kPartTiles);
      WgmmaFence();
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int offset = tile * (kSubTileBytes / 16) + 2 * step;
      WgmmaBf16<64>(s, q + offset, k + offset, tile + step > 0);
    }
  }
  WgmmaCommit();
}

// o += the probabilities of a block * this warpgroup's 256 columns of its latents, queued.
__device__ __forceinline__ void AddValues(const Shared& sh, int b, int half, float (&o)[128]) {
  const uint32_t kv = SharedAddress(sh.kv[b]);
  const uint64_t p = KMajorDescriptor(kv + kRopeOffset);
  const uint64_t v = MnMajorDescriptor(kv + half * 4 * kSubTileBytes, kSubTileBytes);
  const uint64_t v2 = MnMajorDescriptor(kv + (half * 4 + 2) * kSubTileBytes, kSubTileBytes);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WgmmaBf16Transposed<128>(*reinterpret_cast<float(*)[64]>(&o[0]), p + 2 * step, v + 128 * step, true);
    WgmmaBf16Transposed<128>(*reinterpret_cast<float(*)[64]>(&o[64]), p + 2 * step, v2 + 128 * step, true);
  }
  WgmmaCommit();
}

// Most of the time there is nothing to do: GrownMax.
__device__ __forceinline__ void Scale(const float (&factor)[2], float (&o)[128]) {
  if (__all_sync(0xffffffffu, factor[0] == 1 && factor[1] == 1)) return;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      o[4 * j + 2 * i] *= factor[i];
      o[4 * j + 2 * i + 1] *= factor[i];
    }
  }
}

// Scores of keys that a row does not see become -infinity; the largest of each row, in the log2 domain. `key`: the
// block's first; those before `first_key` nobody sees.
__device__ __forceinline__ void MaskAndMax(int32_t key, int32_t first_key, float scale, const RowState& rows,
                                           float (&s)[32], float (&largest)[2]) {
  const int lane = threadIdx.x % kWarpSize;
  if (static_cast<uint32_t>(key + kPageTokens - 1) > rows.last_clear || key < first_key) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int32_t own = key + i / 4 * 8 + 2 * (lane % 4) + i % 2;
      if (own > rows.last_key[i / 2 % 2] || own < first_key) s[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max = s[2 * i];
#pragma unroll
    for (int j = 0; j < 8; ++j) max = fmaxf(fmaxf(max, s[4 * j + 2 * i]), s[4 * j + 2 * i + 1]);
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    largest[i] = max * scale;
  }
}

// kExact: the bits of the CPU's oracle, for 9 % of the kernel's time at 128 sequences of 4,096.
template <bool kExact>
__device__ __forceinline__ float PowerOf2(float x) {
  return kExact ? Exp2(x) : FastExp2(x);
}

// By how much earlier results shrink when the maximum goes from `before` to `max`.
template <bool kExact>
__device__ __forceinline__ float Shrink(float before, float max) {
  return PowerOf2<kExact>(before - (max == -INFINITY ? 0.0f : max));  // nothing seen yet
}

// exp2(score * scale - max) in the place of the block's rotated parts, as bf16; the rows' sums, shrunk, grow by them.
template <bool kExact>
__device__ __forceinline__ void Probabilities(Shared& sh, int b, int row, const float (&s)[32], float scale,
                                              const float (&shrink)[2], RowState& rows) {
  const int lane = threadIdx.x % kWarpSize;
  uint8_t* p = sh.kv[b] + kRopeOffset;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    const float base = rows.max[i] == -INFINITY ? 0.0f : rows.max[i];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float p0 = PowerOf2<kExact>(fmaf(s[4 * j + 2 * i], scale, -base)),
                  p1 = PowerOf2<kExact>(fmaf(s[4 * j + 2 * i + 1], scale, -base));
      sum += p0 + p1;
      *reinterpret_cast<__nv_bfloat162*>(p + Swizzled(r, j) + lane % 4 * 4) = __floats2bfloat162_rn(p0, p1);
    }
    rows.sum[i] = fmaf(rows.sum[i], shrink[i], sum);
    if (lane % 4 == 0) sh.max[b][r] = rows.max[i];
  }
  FenceProxyAsync();
}

// The rows' maximum after the other warpgroup's block, once that one has its probabilities: their sums shrink with it.
template <bool kExact>
__device__ __forceinline__ void TakeMax(const Shared& sh, const Buffers& buffers, int b, int row, RowState& rows,
                                        float (&shrink)[2]) {
  buffers.WaitFull(b, threadIdx.x / kGroupThreads);
  buffers.WaitWeighed(b);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float max = sh.max[b][row + 8 * i];
    shrink[i] = Shrink<kExact>(rows.max[i], max);
    rows.max[i] = max;
    rows.sum[i] *= shrink[i];
  }
}

// Where a split keeps its unscaled result [64,512], then its rows' maxima and sums.
constexpr int64_t kPartialFloats = kRows * kLatentDim + 2 * kRows;

__device__ __forceinline__ void WriteResult(const AttentionArguments& a, const QueryTile& tile, const WorkItem& item,
                                            Shared& sh, int row, RowState& rows, const float (&o)[128]) {
  const int half = threadIdx.x / kGroupThreads, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.sum[i] += __shfl_xor_sync(0xffffffffu, rows.sum[i], 1);
    rows.sum[i] += __shfl_xor_sync(0xffffffffu, rows.sum[i], 2);
    if (lane % 4 == 0) sh.sum[half][row + 8 * i] = rows.sum[i];
  }
  SyncThreads(kConsumerBarrier, kConsumers);
  const int64_t first_row = static_cast<int64_t>(tile.first_token) * a.num_heads + tile.index * kRows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    if (rows.last_key[i] < 0) continue;
    const float sum = sh.sum[0][r] + sh.sum[1][r];
    const int column = 256 * half + 2 * (lane % 4);
    if (item.partial < 0) {
      bf16* out = static_cast<bf16*>(a.out) + (first_row + r) * kLatentDim + column;
      const float factor = sum > 0 ? 1.0f / sum : 0.0f;  // 0: the row sees no key
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        *reinterpret_cast<__nv_bfloat162*>(out + 8 * j) =
            __floats2bfloat162_rn(o[4 * j + 2 * i] * factor, o[4 * j + 2 * i + 1] * factor);
      }
      continue;
    }
    float* partial = a.partials + item.partial * kPartialFloats;
    float* out = partial + r * kLatentDim + column;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      *reinterpret_cast<float2*>(out + 8 * j) = make_float2(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
    }
    if (half == 0 && lane % 4 == 0) {
      partial[kRows * kLatentDim + r] = rows.max[i];
      partial[kRows * kLatentDim + kRows + r] = sum;
    }
  }
}

// What this thread had of a buffer it has read.
__device__ __forceinline__ void Release(Buffers& buffers, int b, int half) {
  BarrierArrive(buffers.Empty(b, half));
  BarrierArrive(buffers.Empty(b, kRopePart));
  buffers.Next(b);
}

// o = o * shrink + this half of a block's values, weighed; the buffer is free then.
__device__ __forceinline__ void TakeValues(const Shared& sh, Buffers& buffers, int b, int half,
                                           const float (&shrink)[2], float (&o)[128]) {
  Scale(shrink, o);
  AddValues(sh, b, half, o);
  WgmmaWait<0>();
  WgmmaKeep(o);
  Release(buffers, b, half);
}

// Scores of a buffer's block, by the warpgroup that makes them.
__device__ __forceinline__ void Score(const Shared& sh, const Buffers& buffers, int b, float (&s)[32]) {
  QueryKeys(sh, buffers, b, s);
  WgmmaWait<0>();
  WgmmaKeep(s);
  buffers.MeetScored(b);  // nobody reads the rotated parts any more
}

// They become its probabilities; by how much the rows' earlier results shrink.
template <bool kExact>
__device__ __forceinline__ void Weigh(Shared& sh, const Buffers& buffers, int b, float scale, int row,
                                      const float (&s)[32], const float (&largest)[2], RowState& rows,
                                      float (&shrink)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float before = rows.max[i];
    rows.max[i] = GrownMax(before, largest[i]);
    shrink[i] = Shrink<kExact>(before, rows.max[i]);
  }
  Probabilities<kExact>(sh, b, row, s, scale, shrink, rows);
  buffers.ArriveWeighed(b);
}

// A pair of blocks by the warpgroup of the even one.
template <bool kExact>
__device__ __forceinline__ void AttendEven(Shared& sh, Buffers& buffers, int32_t key, int32_t first_key, bool has_odd,
                                           float scale, int row, RowState& rows, float (&o)[128]) {
  float s[32], largest[2], shrink[2];
  Score(sh, buffers, 0, s);
  MaskAndMax(key, first_key, scale, rows, s, largest);
  Weigh<kExact>(sh, buffers, 0, scale, row, s, largest, rows, shrink);
  buffers.WaitWeighed(0);
  TakeValues(sh, buffers, 0, 0, shrink, o);
  if (!has_odd) return;
  TakeMax<kExact>(sh, buffers, 1, row, rows, shrink);
  TakeValues(sh, buffers, 1, 0, shrink, o);
}

// The same pair by the warpgroup of the odd one, which hides no key: those that nobody sees lie in a sequence's first.
template <bool kExact>
__device__ __forceinline__ void AttendOdd(Shared& sh, Buffers& buffers, int32_t key, float scale, int row,
                                          RowState& rows, float (&o)[128]) {
  float s[32], largest[2], shrink[2];
  Score(sh, buffers, 1, s);
  MaskAndMax(key, 0, scale, rows, s, largest);
  TakeMax<kExact>(sh, buffers, 0, row, rows, shrink);
  Scale(shrink, o);
  AddValues(sh, 0, 1, o);
  // While tensor cores add the even block's values:
  Weigh<kExact>(sh, buffers, 1, scale, row, s, largest, rows, shrink);
  WgmmaWait<0>();
  WgmmaKeep(o);
  Release(buffers, 0, 1);
  buffers.WaitWeighed(1);
  TakeValues(sh, buffers, 1, 1, shrink, o);
}

// Where the last block is an even one.
template <bool kExact>
__device__ __forceinline__ void AttendNoOdd(Shared& sh, Buffers& buffers, int row, RowState& rows, float (&o)[128]) {
  float shrink[2];
  TakeMax<kExact>(sh, buffers, 0, row, rows, shrink);
  TakeValues(sh, buffers, 0, 1, shrink, o);
}

template <bool kExact>
__device__ __forceinline__ void Consume(const AttentionArguments& a, const QueryTile& tile, const WorkItem& item,
                                        Shared& sh, Buffers& buffers, int group) {
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x % kGroupThreads / kWarpSize * 16 + lane / 4;
  const float scale = a.softmax_scale * kLog2E;
  const int64_t first_row = static_cast<int64_t>(tile.first_token) * a.num_heads + tile.index * kRows;
  const int num_rows = min(kRows, tile.num_rows - tile.index * kRows);
  LoadRows<kConsumers>(SharedAddress(sh.q), static_cast<const uint8_t*>(a.q) + first_row * kEntryDim * 2, kEntryDim * 2,
                       0, num_rows, threadIdx.x);
  CopyAsyncCommit();
  RowState rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    rows.last_key[i] = r < num_rows ? a.positions[tile.first_token + (tile.index * kRows + r) / a.num_heads] : -1;
    rows.max[i] = -INFINITY;
    rows.sum[i] = 0;
  }
  rows.last_clear = __reduce_min_sync(0xffffffffu, umin(rows.last_key[0], rows.last_key[1]));  // NOTE: -1 is large
  float o[128];
#pragma unroll
  for (float& value : o) value = 0;
  CopyAsyncWait<0>();
  FenceProxyAsync();
  SyncThreads(kConsumerBarrier, kConsumers);
  if (group == 0) {
    for (int32_t index = item.block_begin; index < item.block_end; index += 2) {
      AttendEven<kExact>(sh, buffers, index * kPageTokens, a.first_key, index + 1 < item.block_end, scale, row, rows,
                         o);
    }
  } else {
    int32_t index = item.block_begin;
    for (; index + 1 < item.block_end; index += 2) {
      AttendOdd<kExact>(sh, buffers, (index + 1) * kPageTokens, scale, row, rows, o);
    }
    if (index < item.block_end) AttendNoOdd<kExact>(sh, buffers, row, rows, o);
  }
  WriteResult(a, tile, item, sh, row, rows, o);
}

// Items go round a block: one thread of the producers takes the next one when all warps have seen the one before, and
// so runs ahead of those who still multiply.
struct Items {
  uint32_t full, empty;  // barriers
  uint32_t round = 0;

  // The next one; false when there is none left. All warps.
  __device__ bool Next(const Plan& plan, Shared& sh, WorkItem* item, QueryTile* tile) {
    if (threadIdx.x == kConsumers) {
      BarrierWait(empty, round ^ 1);
      sh.item = atomicAdd(plan.header + 1, 1);
      BarrierArrive(full);
    }
    BarrierWait(full, round);
    __syncwarp();
    round ^= 1;
    const int32_t index = sh.item;
    BarrierArrive(empty);
    if (index >= plan.header[0]) return false;
    *item = plan.items[plan.order[index]];
    *tile = plan.tiles[item->tile];
    return true;
  }
};

template <bool kFp8, bool kExact>
__global__ void __launch_bounds__(kThreads<kFp8>, 1)
    MlaKernel(const __grid_constant__ CUtensorMap map, const AttentionArguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory);
  const Plan plan = PlanAt(a.plan, a.num_tokens, a.num_sequences, a.num_heads, a.num_sms);
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      for (int part = 0; part < kParts; ++part) {
        BarrierInit(SharedAddress(&sh.full[b][part]), kProducerGroups<kFp8> * kGroupThreads);
        BarrierInit(SharedAddress(&sh.empty[b][part]), part == kRopePart ? kConsumers : kGroupThreads);
      }
      BarrierInit(SharedAddress(&sh.scored[b]), kGroupThreads);
      BarrierInit(SharedAddress(&sh.weighed[b]), kGroupThreads);
    }
    BarrierInit(SharedAddress(&sh.item_full), 1);
    BarrierInit(SharedAddress(&sh.item_empty), kThreads<kFp8>);
    BarrierInitDone();
  }
  __syncthreads();
  Items items{SharedAddress(&sh.item_full), SharedAddress(&sh.item_empty)};
  Buffers buffers{SharedAddress(sh.full), SharedAddress(sh.empty), SharedAddress(sh.scored), SharedAddress(sh.weighed)};
  WorkItem item;
  QueryTile tile;
  // NOTE: what the one gives the others take: together no more than a block is launched with, or they wait for ever.
  constexpr int kProducerRegisters = kFp8 ? 64 : 56, kConsumerRegisters = kFp8 ? 192 : 224;
  static_assert(kProducerGroups<kFp8> * kProducerRegisters + 2 * kConsumerRegisters <=
                (kProducerGroups<kFp8> + 2) * (65536 / kThreads<kFp8> / 8 * 8));
  // NOTE: told this way the compiler knows that a warpgroup stays together.
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  if (group >= 2) {
    FewerRegisters<kProducerRegisters>();
    while (items.Next(plan, sh, &item, &tile)) {
      if constexpr (kFp8) {
        ProduceFp8(a, tile, item, sh, buffers);
      } else {
        ProduceBf16(a, &map, tile, item, sh, buffers);
      }
    }
  } else {
    MoreRegisters<kConsumerRegisters>();
    // NOTE: keys are there already, and so is a plan that a layer before made; queries come of the kernel before.
    WaitForKernelBefore();
    while (items.Next(plan, sh, &item, &tile)) Consume<kExact>(a, tile, item, sh, buffers, group);
  }
}

constexpr int kJoinBlocksPerSm = 8;

// Joins the splits of tiles, in their order. A block a row, a warp 64 columns of it.
template <bool kExact>
__global__ void __launch_bounds__(256) JoinSplits(const AttentionArguments a) {
  AllowNextKernel();
  constexpr int kWidth = kLatentDim / (256 / kWarpSize);
  static_assert(kWidth == 2 * kWarpSize);
  const Plan plan = PlanAt(a.plan, a.num_tokens, a.num_sequences, a.num_heads, a.num_sms);
  const int lane = threadIdx.x % kWarpSize, column = threadIdx.x / kWarpSize * kWidth + 2 * lane;
  if (blockIdx.x == 0 && threadIdx.x == 0) plan.header[1] = 0;  // for the next layer
  const int32_t num_rows = plan.header[2] * kRows;
  for (int32_t index = blockIdx.x; index < num_rows; index += gridDim.x) {
    const QueryTile tile = plan.tiles[plan.split_tiles[index / kRows]];
    const int r = index % kRows;
    if (tile.index * kRows + r >= tile.num_rows) continue;
    const float* partials = a.partials + tile.first_partial * kPartialFloats;
    const float* maxima = partials + kRows * kLatentDim + r;
    float max = -INFINITY;
    for (int s = lane; s < tile.num_splits; s += kWarpSize) max = fmaxf(max, maxima[s * kPartialFloats]);
    max = WarpMax(max);
    if (max == -INFINITY) max = 0;  // the row sees no key
    float sum = 0;
    float2 o = make_float2(0, 0);
    for (int first = 0; first < tile.num_splits; first += kWarpSize) {
      // Every lane the weight of one split, then all lanes the splits one after the other.
      const bool is_there = first + lane < tile.num_splits;
      const float* own = maxima + (is_there ? first + lane : 0) * kPartialFloats;
      const float own_weight = is_there ? PowerOf2<kExact>(own[0] - max) : 0.0f;
      sum += WarpSum(own_weight * own[kRows]);
      const int count = min(kWarpSize, tile.num_splits - first);
      const float* from = partials + first * kPartialFloats + r * kLatentDim + column;
#pragma unroll 16
      for (int s = 0; s < count; ++s) {
        const float weight = __shfl_sync(0xffffffffu, own_weight, s);
        const float2 part = *reinterpret_cast<const float2*>(from + s * kPartialFloats);
        o.x = fmaf(weight, part.x, o.x);
        o.y = fmaf(weight, part.y, o.y);
      }
    }
    const int64_t row = static_cast<int64_t>(tile.first_token) * a.num_heads + tile.index * kRows + r;
    if (sum == 0) sum = 1;
    *reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(a.out) + row * kLatentDim + column) =
        __floats2bfloat162_rn(o.x / sum, o.y / sum);
  }
}

template <bool kFp8, bool kExact>
bool LaunchMla(cudaStream_t stream, const AttentionArguments& a) {
  CUtensorMap map = {};
  if (!kFp8 && !MakeTensorMap(&map, a.cache,
                              {.cols = kEntryDim,
                               .rows = kPageTokens,
                               .row_bytes = a.token_bytes,
                               .num_groups = a.num_blocks,
                               .group_bytes = a.token_bytes * kPageTokens,
                               .box_rows = kPageTokens})) {
    return false;
  }
  Launch(MlaKernel<kFp8, kExact>, a.has_plan, a.num_sms, kThreads<kFp8>, kSharedBytes, stream, map, a);
  JoinSplits<kExact><<<kJoinBlocksPerSm * a.num_sms, 256, 0, stream>>>(a);
  return true;
}

}  // namespace

cudaError_t PrepareAttention() {
  for (const auto kernel :
       {MlaKernel<false, false>, MlaKernel<false, true>, MlaKernel<true, false>, MlaKernel<true, true>}) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

size_t AttentionPlanBytes(int max_tokens, int max_sequences, int num_heads, int num_sms) {
  const Plan plan = PlanAt(nullptr, max_tokens, max_sequences, num_heads, num_sms);
  return reinterpret_cast<size_t>(plan.tiles + MaxTiles(max_tokens, max_sequences, num_heads));
}

size_t AttentionPartialsBytes(int num_sms) { return kMaxSplitsPerSm * num_sms * kPartialFloats * sizeof(float); }

bool LaunchAttention(cudaStream_t stream, const AttentionArguments& a) {
  if (a.latent_dim != kLatentDim || a.rope_dim != kRopeDim) {
    LaunchPlainAttention(stream, a);
    return true;
  }
  if (!a.has_plan) PlanAttention<<<1, kPlanThreads, 0, stream>>>(a);
  if (a.is_exact) return a.is_fp8 ? LaunchMla<true, true>(stream, a) : LaunchMla<false, true>(stream, a);
  return a.is_fp8 ? LaunchMla<true, false>(stream, a) : LaunchMla<false, false>(stream, a);
}

}  // namespace cachalot
