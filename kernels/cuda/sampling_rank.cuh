// Ranking the logits of a row within one block. No full sort: what filters keep is found by descending over ranges of
// rank keys, with counts or masses of the tokens in each of 2048 parts of a range.
#ifndef CACHALOT_KERNELS_CUDA_SAMPLING_RANK_CUH_
#define CACHALOT_KERNELS_CUDA_SAMPLING_RANK_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/sampling_kernels.h"

namespace cachalot {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int kListSize = 3072;   // tokens that a block ranks in shared memory
constexpr int kRankedSize = 512;  // of them, how many are compared each with each
constexpr int kMassBits = 44;     // masses are integers: their sums do not depend on order
constexpr int kLowMassBits = 14;  // kMaxSampledVocab of these do not overflow 32 bits
static_assert((kMaxSampledVocab << kLowMassBits) <= (int64_t{1} << 32));
constexpr uint64_t kKeepAll = ~uint64_t{0};

struct Shared {
  uint32_t low[kBins], high[kBins];  // counts, or masses by halves
  uint64_t list[kListSize];          // rank keys
  uint64_t keys[kWarps];
  float floats[kWarps];
  uint64_t top[kTopLogits];
  int list_count, top_count;
  bool is_found;
  int bin;
  uint64_t before, weight;
  float floor;
  uint32_t best;  // the largest noisy logit so far, rising
  DrawParams params;
};

// The logits of one row, as a pass sees them: values / divisor of ids below `count`.
struct Row {
  const float* values;
  int count;
  float divisor;
  bool is_aligned;
};

__device__ __forceinline__ Row MakeRow(const float* values, int count, float divisor) {
  return {values, count, divisor, (reinterpret_cast<uintptr_t>(values) & 15) == 0};
}

// Rises with the float.
__device__ __forceinline__ uint32_t Rising(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // NOTE: -0 ranks as 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float FloatOfRising(uint32_t rising) {
  return __uint_as_float((rising & 0x80000000u) != 0 ? rising & 0x7fffffffu : ~rising);
}
// Ranks tokens by falling logit, ties by id: rank keys rise in that order.
__device__ __forceinline__ uint64_t RankKey(float logit, uint32_t id) {
  return static_cast<uint64_t>(~Rising(logit)) << 32 | id;
}
__device__ __forceinline__ float LogitOfKey(uint64_t key) { return FloatOfRising(~static_cast<uint32_t>(key >> 32)); }

constexpr uint64_t kLastKey = 0xff800000ffffffffu;  // of -inf

// ids 4 * group .. 4 * group + 3; -inf past the end.
__device__ __forceinline__ float4 LoadGroup(const Row& row, int group) {
  const int id = 4 * group;
  const float* x = row.values + id;
  float4 v;
  if (row.is_aligned && id + 4 <= row.count) {
    v = *reinterpret_cast<const float4*>(x);
  } else {
    v.x = x[0];
    v.y = id + 1 < row.count ? x[1] : -INFINITY;
    v.z = id + 2 < row.count ? x[2] : -INFINITY;
    v.w = id + 3 < row.count ? x[3] : -INFINITY;
  }
  return v;
}

__device__ __forceinline__ void Divide(float4& v, float divisor) {
  if (divisor == 1.0f) return;
  v.x /= divisor;
  v.y /= divisor;
  v.z /= divisor;
  v.w /= divisor;
}

// visit(group, values) for every group of four ids, each by one thread; a thread's groups rise. kAhead loads in flight.
template <int kAhead, typename Visit>
__device__ __forceinline__ void ForEachGroup(const Row& row, Visit visit) {
  const int num_groups = (row.count + 3) / 4;
  for (int base = threadIdx.x; base < num_groups; base += kAhead * kThreads) {
    float4 v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (base + j * kThreads < num_groups) v[j] = LoadGroup(row, base + j * kThreads);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (base + j * kThreads >= num_groups) break;
      Divide(v[j], row.divisor);
      visit(base + j * kThreads, v[j]);
    }
  }
}

__device__ __forceinline__ float Element(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ float MaxOf(const float4& v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }

// Over the block; every thread gets the result. Sums are taken in a fixed order.
__device__ float BlockSum(Shared& sh, float x) {
  x = WarpSum(x);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) sh.floats[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  return WarpSum(sh.floats[threadIdx.x % kWarpSize]);
}
// The k-th rank of 32 warps' maxima goes to sh.floor: at least that many tokens reach it.
__device__ float BlockMax(Shared& sh, float x, int k) {
  x = WarpMax(x);
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane == 0) sh.floats[warp] = x;
  __syncthreads();
  const float mine = sh.floats[lane];
  if (warp == 0) {
    int rank = 0;
    for (int i = 0; i < kWarps; ++i) {
      const float other = sh.floats[i];
      rank += other > mine || (other == mine && i < lane) ? 1 : 0;
    }
    if (rank == k - 1) sh.floor = mine;
  }
  __syncthreads();
  return WarpMax(mine);
}
__device__ uint64_t BlockMinKey(Shared& sh, uint64_t key) {
  for (int half = 0; half < 2; ++half) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, key, offset);
      key = other < key ? other : key;
    }
    if (half == 1) break;
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) sh.keys[threadIdx.x / kWarpSize] = key;
    __syncthreads();
    key = sh.keys[threadIdx.x % kWarpSize];
  }
  return key;
}

// The largest of a thread's tokens, and the sum of exp(x - max) over them.
struct Running {
  float max = -INFINITY, sum = 0;
  int id = 0;  // the lowest of the largest

  __device__ __forceinline__ void Add(int group, const float4& v) {
    const float largest = MaxOf(v);
    if (largest > max) {
      sum *= __expf(max - largest);
      max = largest;
      id = 4 * group + (v.x == largest ? 0 : v.y == largest ? 1 : v.z == largest ? 2 : 3);
    }
    if (max == -INFINITY) return;
    sum += (__expf(v.x - max) + __expf(v.y - max)) + (__expf(v.z - max) + __expf(v.w - max));
  }
};

// What a row's filters and its draw need to know.
struct Stats {
  uint64_t best = kKeepAll;  // the rank key of the arg-max
  float max = -INFINITY;
  float sum = 0;  // of exp(x - max)
  float thread_max = -INFINITY;
};

__device__ Stats BlockStats(Shared& sh, const Running& running) {
  Stats stats;
  stats.max = BlockMax(sh, running.max, kTopLogits);
  stats.sum = BlockSum(sh, running.max == -INFINITY ? 0.0f : running.sum * __expf(running.max - stats.max));
  stats.best = BlockMinKey(sh, RankKey(running.max, static_cast<uint32_t>(running.id)));
  stats.thread_max = running.max;
  return stats;
}

__device__ __forceinline__ void AddToList(Shared& sh, float x, uint32_t id) {
  if (*static_cast<volatile int*>(&sh.list_count) > kListSize) return;  // NOTE: it is lost already
  const int i = atomicAdd(&sh.list_count, 1);
  if (i < kListSize) sh.list[i] = RankKey(x, id);
}

__device__ void ClearList(Shared& sh) {
  __syncthreads();
  if (threadIdx.x == 0) sh.list_count = 0;
  __syncthreads();
}

// Where a filter finds the tokens it chooses from: all of sh.list, or those of a row that reach `floor`.
struct Source {
  Row row;
  float floor;
  bool is_listed;
};

template <typename Visit>
__device__ __forceinline__ void ForEachKey(const Shared& sh, const Source& source, Visit visit) {
  if (source.is_listed) {
    for (int i = threadIdx.x; i < sh.list_count; i += kThreads) visit(sh.list[i]);
    return;
  }
  ForEachGroup<4>(source.row, [&](int group, const float4& v) {
    if (!(MaxOf(v) >= source.floor)) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x = Element(v, j);
      if (x >= source.floor && x > -INFINITY) visit(RankKey(x, static_cast<uint32_t>(4 * group + j)));
    }
  });
}

// Lists the source's tokens with keys from `low` to `high`; false where they are too many, and the list is no use.
__device__ bool MakeList(Shared& sh, const Source& source, uint64_t low, uint64_t high) {
  ClearList(sh);
  ForEachKey(sh, source, [&](uint64_t key) {
    if (key >= low && key <= high) AddToList(sh, LogitOfKey(key), static_cast<uint32_t>(key));
  });
  __syncthreads();
  return sh.list_count <= kListSize;
}

// How tokens weigh: 1 each, or exp(x - max) in units of 1 / scale.
struct Weighing {
  bool is_by_mass;
  float max, scale;

  __device__ __forceinline__ uint64_t Of(uint64_t key) const {
    return is_by_mass ? __float2ull_rn(expf(LogitOfKey(key) - max) * scale) : 1;
  }
};

// The part of a range in which its weights reach `wanted`, into sh.
__device__ void FindBin(Shared& sh, uint64_t wanted) {
  const int i = 2 * threadIdx.x, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t weights[2];
  for (int j = 0; j < 2; ++j) weights[j] = (static_cast<uint64_t>(sh.high[i + j]) << kLowMassBits) + sh.low[i + j];
  const uint64_t sum = WarpScan(weights[0] + weights[1]);
  if (lane == kWarpSize - 1) sh.keys[warp] = sum;
  __syncthreads();
  uint64_t before = sum - weights[0] - weights[1];
  for (int w = 0; w < warp; ++w) before += sh.keys[w];
  for (int j = 0; j < 2; ++j) {
    if (before < wanted && before + weights[j] >= wanted) {
      sh.is_found = true;
      sh.bin = i + j;
      sh.before = before;
      sh.weight = weights[j];
    }
    before += weights[j];
  }
  __syncthreads();
}

// Whether a range of this weight is sure to hold few tokens.
__device__ __forceinline__ bool IsSmall(const Weighing& weighing, uint64_t weight, uint64_t high) {
  return weight <= static_cast<uint64_t>(kListSize) * weighing.Of(high);
}

// The last key of the shortest run of keys from `low` on, in rank order, whose weights reach `wanted`; kKeepAll where
// those up to `high` do not. Spoils the list unless the source is the list.
__device__ uint64_t Descend(Shared& sh, Source source, const Weighing& weighing, uint64_t wanted, uint64_t low,
                            uint64_t high) {
  if (high < low) return kKeepAll;
  while (true) {
    const int range_bits = 64 - __clzll(static_cast<long long>(high - low));
    const int shift = range_bits > kBinBits ? range_bits - kBinBits : 0;
    for (int i = threadIdx.x; i < kBins; i += kThreads) sh.low[i] = sh.high[i] = 0;
    if (threadIdx.x == 0) sh.is_found = false;
    __syncthreads();
    ForEachKey(sh, source, [&](uint64_t key) {
      if (key < low || key > high) return;
      const uint32_t bin = static_cast<uint32_t>((key - low) >> shift);
      if (!weighing.is_by_mass) {
        atomicAdd(&sh.low[bin], 1u);
        return;
      }
      const uint64_t mass = weighing.Of(key);
      atomicAdd(&sh.low[bin], static_cast<uint32_t>(mass) & ((1u << kLowMassBits) - 1));
      if ((mass >> kLowMassBits) != 0) atomicAdd(&sh.high[bin], static_cast<uint32_t>(mass >> kLowMassBits));
    });
    __syncthreads();
    FindBin(sh, wanted);
    const bool is_found = sh.is_found;
    const uint64_t weight = sh.weight;
    if (is_found) {
      wanted -= sh.before;
      low += static_cast<uint64_t>(sh.bin) << shift;
      const uint64_t last = low + ((uint64_t{1} << shift) - 1);
      high = last < high ? last : high;
    }
    __syncthreads();
    if (!is_found) return kKeepAll;
    if (shift == 0) return low;
    if (!source.is_listed && IsSmall(weighing, weight, high)) source.is_listed = MakeList(sh, source, low, high);
  }
}

}  // namespace
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_SAMPLING_RANK_CUH_
