// Ranking the logits of a row within one block. No full sort: what filters keep is found by descending over ranges of
// rank keys, with counts or masses of the tokens in each of 2048 parts of a range.
#ifndef CACHALOT_KERNELS_CUDA_SAMPLING_RANK_CUH_
#define CACHALOT_KERNELS_CUDA_SAMPLING_RANK_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/sampling_kernels.h"

namespace cachalot {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int kListSize = 2048;   // tokens that a block ranks in shared memory
constexpr int kRaceSize = 1024;   // tokens that a block races in shared memory
constexpr int kMaxMarked = 4096;  // fours of tokens
constexpr int kTopRoom = 128;     // tokens among which a warp finds the 20 largest
constexpr int kMassBits = 44;     // masses are integers: their sums do not depend on order
constexpr int kLowMassBits = 14;  // kMaxSampledVocab of these do not overflow 32 bits
static_assert((kMaxSampledVocab << kLowMassBits) <= (int64_t{1} << 32));
constexpr uint64_t kKeepAll = ~uint64_t{0};
constexpr int kMoreThanListed = kListSize + 1;
constexpr int kMaxExtras = kMaxTokenEntries + kMaxLater;

// Rank keys of tokens; of more than kListSize only how many there were.
struct List {
  uint64_t keys[kListSize];
  int count;
};

struct Extra {
  int token;
  float logit;
};

// What shapes the logits that a row draws from (sampling_shape.cuh).
struct Shape {
  const float* raw;        // fours are aligned
  const uint16_t* counts;  // likewise; null: no penalties
  const uint32_t* mask;    // null: all are allowed
  const BiasEntry *banned, *biased;
  int num_banned, num_biased;
  int first_later, last_later;  // rows of the sequence after this one
  const int32_t* row_tokens;
  int num_valid;
  bool is_banning;

  __device__ bool IsShaped() const { return counts != nullptr || mask != nullptr || num_biased > 0 || is_banning; }
};

// Sums over the block.
struct Total {
  float sum, reference;
};

// What is known of a row once it was read (sampling_read.cuh).
struct Reading {
  Total raw;            // of the logits as they are
  Total drawn;          // of those to draw from
  float raw_floor;      // sh.raw has all tokens above
  float floor;          // sh.shaped has all tokens above, before temperature; where nothing is shaped sh.raw has
  float race_floor;     // sh.race has all tokens that reach it, but for such as cannot win
  float sure_exponent;  // tokens of a larger logit / temperature * log2(e) are few enough for top_p, if
  float above_sure;     // this, their share of drawn.sum, says so
};

// What a draw needs of its parameters, by value.
struct Draws {
  float scale, temperature;  // scale: log2(e) / temperature
  uint32_t position, choice;
  uint64_t seed;
  int floor_rank;  // in a warp's sample, of what the lists' floors are made of: larger for longer lists
};

struct Shared {
  uint32_t low[kBins], high[kBins];  // counts, or masses by halves
  List raw, shaped;                  // tokens above a floor: as the model gave them, and as they are drawn from
  List list;
  uint32_t marked[kMaxMarked];  // fours to look at: of large tokens, and of likely winners (the highest bit)
  uint64_t race[kRaceSize];     // rising noisy logits, then falling ids
  float race_logits[kRaceSize];
  Extra extras[kMaxExtras];
  uint32_t dead[kMaxSampledVocab / 32 + 1];  // a bit a token; a group past the last may be asked for
  uint64_t keys[kWarps];
  float floats[kWarpSize], more_floats[kWarpSize];
  uint64_t top[kTopRoom];
  int num_marked, race_count, num_extras, top_count;
  bool is_found;
  int bin;
  uint64_t before, weight;
  float floor;
  uint32_t best;  // the largest noisy logit so far, or a bound of it, rising
  DrawParams params;
  Shape shape;
  Draws draws;
  Reading reading;
};

// Logits by aligned fours.
struct Row {
  const float4* values;
  int num_groups;
};

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

// visit(group, values) for every group of four ids, each by one thread; a thread's groups rise. kAhead loads in flight.
template <int kAhead, typename Visit>
__device__ __forceinline__ void ForEachGroup(const Row& row, Visit visit) {
  for (int base = threadIdx.x; base < row.num_groups; base += kAhead * kThreads) {
    float4 v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (base + j * kThreads < row.num_groups) v[j] = row.values[base + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (base + j * kThreads < row.num_groups) visit(base + j * kThreads, v[j]);
    }
  }
}

__device__ __forceinline__ float Element(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ float MaxOf(const float4& v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }

// Over the block; every thread gets the result. Sums are taken in a fixed order.
__device__ float BlockSum(Shared& sh, float x) {
  const int lane = threadIdx.x % kWarpSize;
  x = WarpSum(x);
  __syncthreads();
  if (lane == 0) sh.floats[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  return WarpSum(lane < kWarps ? sh.floats[lane] : 0.0f);
}
__device__ float BlockMax(Shared& sh, float x) {
  const int lane = threadIdx.x % kWarpSize;
  x = WarpMax(x);
  __syncthreads();
  if (lane == 0) sh.floats[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  return WarpMax(sh.floats[lane % kWarps]);
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
    key = sh.keys[threadIdx.x % kWarps];
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
  stats.max = BlockMax(sh, running.max);
  stats.sum = BlockSum(sh, running.max == -INFINITY ? 0.0f : running.sum * __expf(running.max - stats.max));
  stats.best = BlockMinKey(sh, RankKey(running.max, static_cast<uint32_t>(running.id)));
  stats.thread_max = running.max;
  return stats;
}

__device__ __forceinline__ void AddToList(List& list, float x, uint32_t id) {
  if (*static_cast<volatile int*>(&list.count) > kListSize) return;  // NOTE: it is lost already
  const int i = atomicAdd(&list.count, 1);
  if (i < kListSize) list.keys[i] = RankKey(x, id);
}

__device__ void ClearList(List& list) {
  __syncthreads();
  if (threadIdx.x == 0) list.count = 0;
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
    for (int i = threadIdx.x; i < sh.list.count; i += kThreads) visit(sh.list.keys[i]);
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
  ClearList(sh.list);
  ForEachKey(sh, source, [&](uint64_t key) {
    if (key >= low && key <= high) AddToList(sh.list, LogitOfKey(key), static_cast<uint32_t>(key));
  });
  __syncthreads();
  return sh.list.count <= kListSize;
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
  constexpr int kBinsPerThread = kBins / kThreads;
  const int first = kBinsPerThread * threadIdx.x, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t weights[kBinsPerThread], own = 0;
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) {
    weights[j] = (static_cast<uint64_t>(sh.high[first + j]) << kLowMassBits) + sh.low[first + j];
    own += weights[j];
  }
  const uint64_t sum = WarpScan(own);
  if (lane == kWarpSize - 1) sh.keys[warp] = sum;
  __syncthreads();
  uint64_t before = sum - own;
  for (int w = 0; w < warp; ++w) before += sh.keys[w];
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) {
    if (before < wanted && before + weights[j] >= wanted) {
      sh.is_found = true;
      sh.bin = first + j;
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
__device__ __noinline__ uint64_t Descend(Shared& sh, Source source, const Weighing& weighing, uint64_t wanted,
                                         uint64_t low, uint64_t high) {
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

// By rank. All tokens of the list, which is not too long.
__device__ void SortList(Shared& sh) {
  const int count = sh.list.count;
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kThreads) sh.list.keys[i] = kKeepAll;
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t a = sh.list.keys[low], b = sh.list.keys[high];
        if ((a > b) == ((low & run) == 0)) sh.list.keys[low] = b, sh.list.keys[high] = a;
      }
    }
  }
  __syncthreads();
}

// Of a sorted list's first `count` tokens those whose masses before them are less than top_p of what `total_of` makes
// of their sum: how many; kMoreThanListed where the sum is less than that.
template <typename TotalOf>
__device__ int NucleusOfSorted(Shared& sh, const Weighing& weighing, int count, float top_p, TotalOf total_of) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int share = (count + kThreads - 1) / kThreads;
  const int begin = min(count, static_cast<int>(threadIdx.x) * share), end = min(count, begin + share);
  uint64_t own = 0;
  for (int i = begin; i < end; ++i) own += weighing.Of(sh.list.keys[i]);
  const uint64_t sum = WarpScan(own);
  __syncthreads();
  if (lane == kWarpSize - 1) sh.keys[warp] = sum;
  __syncthreads();
  uint64_t before = sum - own, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? sh.keys[w] : 0;
    all += sh.keys[w];
  }
  const uint64_t wanted = __double2ull_ru(fmax(static_cast<double>(top_p) * total_of(all), 1.0));
  int kept = 0;
  for (int i = begin; i < end; ++i) {
    kept += before < wanted ? 1 : 0;
    before += weighing.Of(sh.list.keys[i]);
  }
  kept = __reduce_add_sync(0xffffffffu, kept);
  __syncthreads();
  if (lane == 0) sh.keys[warp] = static_cast<uint64_t>(kept) << 1 | (all >= wanted ? 1 : 0);
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kWarps; ++w) total += static_cast<int>(sh.keys[w] >> 1);
  return (sh.keys[0] & 1) != 0 ? total : kMoreThanListed;
}

}  // namespace
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_SAMPLING_RANK_CUH_
