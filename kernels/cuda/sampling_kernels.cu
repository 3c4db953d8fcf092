// Sampling kernels: one block a row of logits, which it reads once; then one block that verifies drafts. At 128 rows of
// 129280 fp32 logits the floor is one reading of 66 MB: 15 us at 4.4 TB/s (with penalties 99 MB, 23 us). What filters
// keep is decided from lists of the largest tokens and of the likely winners; where these are too short to tell (ties,
// top_k of thousands, rows in order) the row is written out and read as often as it takes.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/sampling_kernels.h"
#include "kernels/cuda/sampling_rank.cuh"
#include "kernels/cuda/sampling_read.cuh"

namespace cachalot {
namespace {

// With u = (r + 0.5) * 2^-23 the noise -log(-log(u)) lies in (-2.82, 16.64).
constexpr float kNoiseSpan = 20.0f;
constexpr float kLeastNoise = -2.83f;
constexpr float kMostNoise = 16.7f;

// What is no token.
constexpr int32_t kUndecided = -1, kBannedOut = -2;

constexpr int kTopKOfShortList = 100;  // which is nearly always that long

__device__ __forceinline__ int64_t WorkStride(const SampleArgs& args) { return SampleWorkStride(args.num_tokens); }
__device__ __forceinline__ float* WorkRow(const SampleArgs& args, int l) {
  return args.processed + l * WorkStride(args);
}

// Of raw logits, where fours are aligned.
__device__ Row CopyOfRow(const SampleArgs& args, int l) {
  const float* raw = args.logits + l * args.logits_stride;
  float* copy = WorkRow(args, l);
#pragma unroll 4
  for (int id = threadIdx.x; id < WorkStride(args); id += kThreads)
    copy[id] = id < args.num_tokens ? raw[id] : -INFINITY;
  __syncthreads();
  return {reinterpret_cast<const float4*>(copy), static_cast<int>(WorkStride(args) / 4)};
}

// [0, sh.top_count) of sh.top <- the list's tokens that may be among its 20 largest; more than kTopRoom are no use. One
// warp: of the lanes' largest the 20th largest is a bound.
__device__ void PickTop(Shared& sh, const List& list) {
  const int lane = threadIdx.x, count = list.count;
  uint32_t first = ~uint32_t{0};
#pragma unroll 4
  for (int i = lane; i < count; i += kWarpSize) first = min(first, static_cast<uint32_t>(list.keys[i] >> 32));
  int before = 0;
#pragma unroll 8
  for (int i = 0; i < kWarpSize; ++i) before += __shfl_sync(0xffffffffu, first, i) < first ? 1 : 0;
  // NOTE: of equals all have the rank of the first.
  const uint32_t cut = __reduce_max_sync(0xffffffffu, before < kTopLogits ? first : 0);
  if (lane == 0) sh.top_count = 0;
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < count; i += kWarpSize) {
    const uint64_t key = list.keys[i];
    if (static_cast<uint32_t>(key >> 32) > cut) continue;
    const int place = atomicAdd(&sh.top_count, 1);
    if (place < kTopRoom) sh.top[place] = key;
  }
}

// Of a row of any order; spoils the list.
__device__ __noinline__ void PickTopSlowly(Shared& sh, const Row& row) {
  const Source source = {row, -INFINITY, false};
  const uint64_t cut = Descend(sh, source, {false, 0, 0}, kTopLogits, 0, kLastKey);
  if (threadIdx.x == 0) sh.top_count = 0;
  __syncthreads();
  ForEachKey(sh, source, [&](uint64_t key) {
    if (key <= cut) sh.top[atomicAdd(&sh.top_count, 1)] = key;
  });
  __syncthreads();
}

// The 20 largest raw logits.
__device__ void WriteTop(Shared& sh, const SampleArgs& args, int l, float log_sum) {
  const List& list = sh.raw;
  const bool is_listed = list.count <= kListSize && (list.count >= kTopLogits || sh.reading.raw_floor == -INFINITY);
  if (threadIdx.x < kWarpSize && is_listed) PickTop(sh, list);
  __syncthreads();
  if (!is_listed || sh.top_count > kTopRoom) PickTopSlowly(sh, CopyOfRow(args, l));
  int32_t* ids = args.top_tokens + l * args.top_tokens_stride;
  float* logprobs = args.top_logprobs + l * args.top_logprobs_stride;
  const int i = threadIdx.x, count = sh.top_count;
  if (i < count) {
    const uint64_t key = sh.top[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += sh.top[j] < key ? 1 : 0;
    if (rank < kTopLogits) {
      ids[rank] = static_cast<int32_t>(static_cast<uint32_t>(key));
      logprobs[rank] = LogitOfKey(key) - log_sum;
    }
  } else if (i < kTopLogits) {
    ids[i] = -1;
    logprobs[i] = -INFINITY;
  }
}

__device__ Stats StatsOf(Shared& sh, const Row& row) {
  Running running;
  ForEachGroup<4>(row, [&](int group, const float4& v) { running.Add(group, v); });
  return BlockStats(sh, running);
}

// A logit that at least k of the block's tokens reach, and hardly more. Spoils the list.
__device__ float FloorOfTop(Shared& sh, const Stats& stats, int k) {
  if (k > kThreads) return -INFINITY;
  __syncthreads();
  sh.list.keys[threadIdx.x] = RankKey(stats.thread_max, threadIdx.x);
  if (threadIdx.x == 0) sh.list.count = kThreads;
  __syncthreads();
  const uint64_t key = Descend(sh, {{}, 0, true}, {false, 0, 0}, k, RankKey(stats.max, 0), kLastKey);
  return LogitOfKey(key);
}

// The units of mass in which `sum` comes near 2^kMassBits.
__device__ __forceinline__ float MassScale(float sum) {
  const int exponent = min(max(ilogbf(sum) + 1, 0), 20);
  return ldexpf(1.0f, kMassBits - exponent);
}

// The nucleus of the source's tokens up to `cut`: the last key that top_p keeps.
__device__ __noinline__ uint64_t NucleusCut(Shared& sh, const Source& source, const Stats& stats, const DrawParams& p,
                                            bool has_top_k, uint64_t cut) {
  const Weighing weighing = {true, stats.max, MassScale(stats.sum)};
  double total = static_cast<double>(stats.sum) * static_cast<double>(weighing.scale);
  if (has_top_k) {
    // What top_k left: summed as integers, by halves.
    __syncthreads();
    if (threadIdx.x == 0) sh.weight = 0;
    __syncthreads();
    uint64_t mass = 0;
    ForEachKey(sh, source, [&](uint64_t key) { mass += key <= cut ? weighing.Of(key) : 0; });
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) mass += __shfl_xor_sync(0xffffffffu, mass, offset);
    if (threadIdx.x % kWarpSize == 0) atomicAdd(reinterpret_cast<unsigned long long*>(&sh.weight), mass);
    __syncthreads();
    total = static_cast<double>(sh.weight);
    __syncthreads();
  }
  const uint64_t wanted = __double2ull_ru(fmax(static_cast<double>(p.top_p) * total, 1.0));
  const uint64_t high = min(cut, RankKey(source.floor, ~uint32_t{0}));
  return min(cut, Descend(sh, source, weighing, wanted, RankKey(stats.max, 0), high));
}

// The arg-max of noisy logits, kept as a key that rises with the value and falls with the id.
struct Race {
  uint64_t best = 0;

  // NOTE: -log(u) >= 1 - u, so the noise is at most -log(1 - u): most tokens are out without a logarithm.
  __device__ __forceinline__ void Enter(Shared& sh, float x, uint32_t id, uint32_t bits, float bound) {
    const float r = static_cast<float>(bits >> 9);
    const float rest = ((8388607.0f - r) + 0.5f) * 0x1p-23f;  // 1 - u, exactly
    if (rest > __expf(x - bound + (0.01f + 1e-6f * fabsf(bound)))) return;
    const uint32_t rising = Rising(x + Noise(bits));
    const uint64_t key = static_cast<uint64_t>(rising) << 32 | ~id;
    if (key <= best) return;
    best = key;
    if (rising > *static_cast<volatile uint32_t*>(&sh.best)) atomicMax(&sh.best, rising);
  }
};

__device__ __noinline__ int32_t GumbelArgMax(Shared& sh, const Source& source, uint64_t cut, const Stats& stats,
                                             const DrawParams& p, uint32_t position) {
  __syncthreads();
  // NOTE: the largest logit is always kept, so the winner is no worse than it with the least noise.
  if (threadIdx.x == 0) sh.best = Rising(stats.max + kLeastNoise);
  __syncthreads();
  const volatile uint32_t* shared_best = &sh.best;
  Race race;
  if (source.is_listed) {
    for (int i = threadIdx.x; i < sh.list.count; i += kThreads) {
      const uint64_t key = sh.list.keys[i];
      const uint32_t id = static_cast<uint32_t>(key);
      const float x = LogitOfKey(key), bound = FloatOfRising(*shared_best);
      if (key > cut || x + kMostNoise < bound) continue;
      const uint4 words = Philox(id / 4, position, p.choice, p.seed);
      race.Enter(sh, x, id, WordOf(words, id), bound);
    }
  } else {
    ForEachGroup<4>(source.row, [&](int group, const float4& v) {
      const float bound = FloatOfRising(*shared_best), largest = MaxOf(v);
      const uint32_t id = static_cast<uint32_t>(4 * group);
      if (!(largest >= source.floor) || largest + kMostNoise < bound || RankKey(largest, id) > cut) return;
      const uint4 words = Philox(static_cast<uint32_t>(group), position, p.choice, p.seed);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = Element(v, j);
        if (!(x > -INFINITY) || RankKey(x, id + j) > cut) continue;
        race.Enter(sh, x, id + j, WordOf(words, id + j), bound);
      }
    });
  }
  // NOTE: best rises where BlockMinKey wants what falls.
  const uint64_t best = ~BlockMinKey(sh, ~race.best);
  return static_cast<int32_t>(static_cast<uint32_t>(best == 0 ? stats.best : ~best));
}

// top_k, then top_p of what it leaves, then min_p; then noise.
__device__ int32_t FilterAndDraw(Shared& sh, const Row& row, const Stats& stats, const DrawParams& p,
                                 uint32_t position) {
  const bool has_top_k = p.top_k > 0 && p.top_k < 4 * row.num_groups, has_top_p = p.top_p < 1;
  const float least = p.min_p > 0 ? stats.max + logf(p.min_p) : -INFINITY;
  Source source = {row, -INFINITY, false};
  uint64_t cut = kKeepAll;
  if (has_top_k || has_top_p) {
    // Tokens below these bounds change nothing of what is drawn: they cannot win, and filters that take tokens from the
    // largest on reach them last.
    if (has_top_k) {
      source.floor = FloorOfTop(sh, stats, p.top_k);
    } else {
      // Tokens below (1 - top_p) / n of the mass cannot add up to what the nucleus leaves out.
      const float share = (1 - fmaxf(p.top_p, 0.0f)) * stats.sum / static_cast<float>(4 * row.num_groups);
      source.floor = stats.max + logf(share) - 1e-3f;
    }
    if (!has_top_k || !has_top_p) source.floor = fmaxf(source.floor, fmaxf(stats.max - kNoiseSpan, least));
    source.floor = fminf(source.floor, stats.max);
    const uint64_t low = RankKey(stats.max, 0), high = RankKey(source.floor, ~uint32_t{0});
    source.is_listed = MakeList(sh, source, low, high);
    if (has_top_k) cut = Descend(sh, source, {false, 0, 0}, p.top_k, low, high);
    if (has_top_p) cut = NucleusCut(sh, source, stats, p, has_top_k, cut);
  } else {
    source.floor = fminf(fmaxf(stats.max - kNoiseSpan, least), stats.max);
  }
  if (p.min_p > 0) cut = min(cut, RankKey(least, ~uint32_t{0}));
  return GumbelArgMax(sh, source, cut, stats, p, position);
}

// The token of a row in any order, by as many readings as it takes. kBannedOut where bans leave nothing.
__device__ __noinline__ int32_t DrawSlowly(Shared& sh, float* work, int stride) {
  const Shape& shape = sh.shape;
  const DrawParams& p = sh.params;
  const float divisor = p.temperature == 0 ? 1.0f : p.temperature;
#pragma unroll 4
  for (int id = threadIdx.x; id < stride; id += kThreads) {
    work[id] = id < shape.num_valid ? ShapedToken(sh, shape, id, shape.raw[id]) / divisor : -INFINITY;
  }
  __syncthreads();
  for (int i = threadIdx.x; shape.IsShaped() && i < sh.num_extras; i += kThreads) {
    work[sh.extras[i].token] = sh.extras[i].logit / divisor;
  }
  __syncthreads();
  const Row row = {reinterpret_cast<const float4*>(work), stride / 4};
  const Stats stats = StatsOf(sh, row);
  if (stats.max == -INFINITY) return shape.is_banning ? kBannedOut : 0;
  // NOTE: a greedy row was not divided by its temperature: no tie is made.
  if (p.temperature == 0) return static_cast<int32_t>(static_cast<uint32_t>(stats.best));
  return FilterAndDraw(sh, row, stats, p, sh.draws.position);
}

// What draws from the lists know.
struct Listed {
  Stats stats;
  float floor;  // sh.list has all tokens above, by falling logit / temperature
  bool is_all;  // nothing is below
};

// sh.list <- the tokens that can be drawn, divided by the temperature (greedy: by 1).
__device__ Listed MakeDrawList(Shared& sh, float divisor) {
  const Shape& shape = sh.shape;
  const Reading& reading = sh.reading;
  const List& from = shape.IsShaped() ? sh.shaped : sh.raw;
  Listed listed;
  listed.floor = reading.floor / divisor;
  listed.is_all = reading.floor == -INFINITY;
  ClearList(sh.list);
  uint64_t best = kKeepAll;
  for (int i = threadIdx.x; i < from.count; i += kThreads) {
    const uint32_t id = static_cast<uint32_t>(from.keys[i]);
    const float logit = LogitOfKey(from.keys[i]), divided = logit / divisor;
    if (id >= static_cast<uint32_t>(shape.num_valid)) continue;
    best = min(best, from.keys[i]);
    // NOTE: division may make a tie with what lies below.
    if (divided > listed.floor) AddToList(sh.list, divided, id);
  }
  best = BlockMinKey(sh, best);
  listed.stats.best = best;
  if (best == kKeepAll) return listed;
  listed.stats.max = LogitOfKey(best) / divisor;
  const Total& drawn = reading.drawn;
  listed.stats.sum = drawn.sum * exp2f(drawn.reference - LogitOfKey(best) * (kLog2e / divisor));
  return listed;
}

// The sum of 2^(logit * scale - reference) of the tokens that rank before one. Reads the row's end first: it was read
// last.
template <bool kShaped>
__device__ __noinline__ float MassBefore(Shared& sh, uint64_t key) {
  constexpr int kStride = kAhead * kThreads;
  const Shape shape = sh.shape;
  const Draws draws = sh.draws;
  const float reference = sh.reading.drawn.reference;
  const int num_groups = shape.num_valid / 4;
  // NOTE: who is near in single precision is compared after division.
  const float exponent = LogitOfKey(key) * kLog2e - reference;
  const float doubt = 0.01f + 1e-6f * (fabsf(reference) + fabsf(exponent));
  const float most = exponent + doubt;
  float sum = 0;
  const auto add_doubtful = [&](int id, float x) {
    if (RankKey(x / draws.temperature, static_cast<uint32_t>(id)) < key) {
      sum += FastExp2(fmaf(x, draws.scale, -reference));
    }
  };
  float4 x[kAhead];
  uint2 counts[kAhead];
  const auto load = [&](int j, int base) {
    const int group = base + j * kThreads;
    x[j] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    if (group < 0 || group >= num_groups) return;
    x[j] = LoadRaw(shape, group);
    counts[j] = kShaped ? LoadCounts(shape, group) : make_uint2(0, 0);
  };
  const int last = (num_groups + kStride - 1) / kStride * kStride - kStride + static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < kAhead; ++j) load(j, last);
#pragma unroll 1
  for (int base = last; base >= 0; base -= kStride) {
    uint32_t doubtful = 0;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int group = min(base + j * kThreads, num_groups);
      const float4 v = kShaped ? Shaped(sh, group, x[j], counts[j]) : x[j];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float own = fmaf(Element(v, k), draws.scale, -reference);
        sum += own > most ? FastExp2(own) : 0.0f;
        if (fabsf(own - exponent) <= doubt) doubtful |= 1u << j;
      }
      load(j, base - kStride);
    }
#pragma unroll 1
    for (; doubtful != 0; doubtful &= doubtful - 1) {
      const int group = base + (__ffs(static_cast<int>(doubtful)) - 1) * kThreads;
      const float4 raw = LoadRaw(shape, group);
      const float4 v = kShaped ? Shaped(sh, group, raw, LoadCounts(shape, group)) : raw;
#pragma unroll 1
      for (int k = 0; k < 4; ++k) {
        const float own = fmaf(Element(v, k), draws.scale, -reference);
        if (!(own > most) && fabsf(own - exponent) <= doubt) add_doubtful(4 * group + k, Element(v, k));
      }
    }
  }
  const auto add = [&](int id, float logit) {
    const float own = fmaf(logit, draws.scale, -reference);
    if (own > most) {
      sum += FastExp2(own);
    } else if (fabsf(own - exponent) <= doubt) {
      add_doubtful(id, logit);
    }
  };
#pragma unroll 1
  for (int id = 4 * num_groups + threadIdx.x; id < shape.num_valid; id += kThreads) {
    add(id, ShapedToken(sh, shape, id, shape.raw[id]));
  }
#pragma unroll 1
  for (int i = threadIdx.x; kShaped && i < sh.num_extras; i += kThreads) add(sh.extras[i].token, sh.extras[i].logit);
  return BlockSum(sh, sum);
}

// The sum of the listed masses of tokens that rank before one, in units of 1 / weighing.scale.
__device__ uint64_t ListedMassBefore(Shared& sh, const Weighing& weighing, uint64_t key) {
  const int lane = threadIdx.x % kWarpSize;
  uint64_t mass = 0;
  for (int i = threadIdx.x; i < sh.list.count; i += kThreads) {
    if (sh.list.keys[i] < key) mass += weighing.Of(sh.list.keys[i]);
  }
  mass = WarpSum(mass);
  __syncthreads();
  if (lane == 0) sh.keys[threadIdx.x / kWarpSize] = mass;
  __syncthreads();
  return WarpSum(lane < kWarps ? sh.keys[lane] : uint64_t{0});
}

// What top_p asks for, and whether the list has it.
struct Nucleus {
  Weighing weighing;
  uint64_t wanted;
  bool is_listed;
};

constexpr int kMaxTries = 4;  // then sorting the list costs less

// The first of the likely winners, best first, that top_p and min_p keep.
__device__ int32_t DrawFromRace(Shared& sh, const Listed& listed, const Nucleus& nucleus, float least) {
  const int count = sh.race_count;
  if (count > kRaceSize) return kUndecided;
  const bool has_top_p = sh.params.top_p < 1;
  const Reading& reading = sh.reading;
  const float wanted = sh.params.top_p * reading.drawn.sum;
  const bool is_sure = reading.above_sure < wanted;
  const float sure = reading.sure_exponent + 0.01f + 1e-6f * fabsf(reading.sure_exponent);
  uint64_t last = kKeepAll, out = kKeepAll;  // who ranks behind `out` is not kept
  for (int tries = 0; tries < kMaxTries || !nucleus.is_listed; ++tries) {
    uint64_t best = 0;
    int index = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (sh.race[i] < last && sh.race[i] > best) best = sh.race[i], index = i;
    }
    last = ~BlockMinKey(sh, ~best);
    if (last == 0) return kUndecided;
    if (best == last) sh.bin = index;
    __syncthreads();
    const float logit = sh.race_logits[sh.bin];
    const uint32_t id = ~static_cast<uint32_t>(last);
    const uint64_t key = RankKey(logit, id);
    if (!(logit >= least) || key >= out) continue;
    if (!has_top_p) return static_cast<int32_t>(id);
    if (nucleus.is_listed) {
      if (logit > listed.floor && ListedMassBefore(sh, nucleus.weighing, key) < nucleus.wanted) {
        return static_cast<int32_t>(id);
      }
      out = key;
      continue;
    }
    if (logit > listed.floor || (is_sure && logit * kLog2e > sure)) return static_cast<int32_t>(id);
    const float before = sh.shape.IsShaped() ? MassBefore<true>(sh, key) : MassBefore<false>(sh, key);
    if (before < wanted) return static_cast<int32_t>(id);
    out = key;
  }
  return kUndecided;
}

// The winner of the list's tokens that the filters keep.
__device__ int32_t DrawFromSorted(Shared& sh, const Listed& listed, float least, bool has_top_k) {
  const DrawParams& p = sh.params;
  const Stats& stats = listed.stats;
  int kept = sh.list.count;
  if (has_top_k || p.top_p < 1) {
    SortList(sh);
    if (has_top_k) kept = min(kept, p.top_k);
    if (p.top_p < 1) {
      const Weighing weighing = {true, stats.max, MassScale(stats.sum)};
      const double total = static_cast<double>(stats.sum) * static_cast<double>(weighing.scale);
      const auto total_of = [&](uint64_t mass) { return has_top_k ? static_cast<double>(mass) : total; };
      kept = min(kept, NucleusOfSorted(sh, weighing, kept, p.top_p, total_of));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) sh.list.count = kept;
  const uint64_t cut = p.min_p > 0 ? RankKey(least, ~uint32_t{0}) : kKeepAll;
  return GumbelArgMax(sh, {{}, listed.floor, true}, cut, stats, p, sh.draws.position);
}

// The token of a row, if what was listed while it was read can tell.
__device__ __noinline__ int32_t DrawFromLists(Shared& sh) {
  const DrawParams& p = sh.params;
  const Shape& shape = sh.shape;
  const bool is_greedy = p.temperature == 0, has_top_k = p.top_k > 0 && p.top_k < shape.num_valid;
  Listed listed = {{}, INFINITY, false};
  if ((shape.IsShaped() ? sh.shaped : sh.raw).count <= kListSize) {
    listed = MakeDrawList(sh, is_greedy ? 1.0f : p.temperature);
  }
  const Stats& stats = listed.stats;
  if (is_greedy && stats.best != kKeepAll) return static_cast<int32_t>(static_cast<uint32_t>(stats.best));
  if (listed.is_all && stats.best == kKeepAll) return 0;
  if (is_greedy || !(sh.reading.drawn.sum > 0 && sh.reading.drawn.sum < INFINITY)) return kUndecided;
  Nucleus nucleus = {};
  if (stats.best == kKeepAll) {
    return has_top_k || p.min_p > 0 ? kUndecided : DrawFromRace(sh, listed, nucleus, -INFINITY);
  }
  const float least = p.min_p > 0 ? stats.max + logf(p.min_p) : -INFINITY;
  if (has_top_k) {
    if (sh.list.count < p.top_k && !listed.is_all) return kUndecided;
    return DrawFromSorted(sh, listed, least, true);
  }
  if (p.top_p < 1) {
    nucleus.weighing = {true, stats.max, MassScale(stats.sum)};
    const double total = static_cast<double>(stats.sum) * static_cast<double>(nucleus.weighing.scale);
    nucleus.wanted = __double2ull_ru(fmax(static_cast<double>(p.top_p) * total, 1.0));
    nucleus.is_listed = ListedMassBefore(sh, nucleus.weighing, kKeepAll) >= nucleus.wanted;
  }
  const int32_t token = DrawFromRace(sh, listed, nucleus, least);
  if (token != kUndecided) return token;
  if (!nucleus.is_listed && !listed.is_all && !(least > listed.floor)) return kUndecided;
  return DrawFromSorted(sh, listed, least, false);
}

__device__ void Read(Shared& sh, int num_tokens, bool has_fours) {
  const bool is_shaped = sh.shape.IsShaped() && has_fours;
  if (sh.draws.temperature == 0 || !has_fours) {
    is_shaped ? ReadRow<true, false>(sh, num_tokens) : ReadRow<false, false>(sh, num_tokens);
  } else {
    is_shaped ? ReadRow<true, true>(sh, num_tokens) : ReadRow<false, true>(sh, num_tokens);
  }
}

// sh.params, sh.shape and sh.draws <- of row l.
__device__ __noinline__ void Prepare(Shared& sh, const SampleArgs& args, int l, int slot) {
  // NOTE: the row's sample is on its way while parameters are looked up.
  const int num_groups = args.num_valid_tokens / 4, segment = num_groups / (kAhead * kThreads) * kThreads;
  const float* raw = args.logits + l * args.logits_stride;
  for (int j = 0; j < kAhead && segment > 0; ++j) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(raw + 4 * (j * segment + static_cast<int>(threadIdx.x))));
  }
  const uint32_t position = static_cast<uint32_t>(args.positions[args.row_token[l]]) + 1;
  const bool is_scored = args.row_target[l] >= 0;
  constexpr int kWords = sizeof(DrawParams) / sizeof(uint32_t);
  if (threadIdx.x < kWords) {
    const uint8_t* params = args.params + slot * args.params_stride;
    reinterpret_cast<uint32_t*>(&sh.params)[threadIdx.x] = reinterpret_cast<const uint32_t*>(params)[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const DrawParams& p = sh.params;
    Shape shape = MakeShape(args, l, slot, p, position);
    if (is_scored) shape.counts = nullptr, shape.mask = nullptr, shape.num_biased = 0, shape.is_banning = false;
    const float temperature = is_scored ? 0 : p.temperature;
    sh.shape = shape;
    sh.draws = {kLog2e / temperature, temperature, position, p.choice, p.seed, p.top_k > kTopKOfShortList ? 3 : 0};
  }
  __syncthreads();
  if ((reinterpret_cast<uintptr_t>(sh.shape.raw) & 15) == 0) return;
  const Row copy = CopyOfRow(args, l);
  if (threadIdx.x == 0) sh.shape.raw = reinterpret_cast<const float*>(copy.values);
  __syncthreads();
}

__device__ void StopBanning(Shared& sh) {
  __syncthreads();
  if (threadIdx.x == 0) sh.shape.is_banning = false;
  __syncthreads();
}

// The 20 largest logits, and the token.
__device__ int32_t ScoreAndDraw(Shared& sh, const SampleArgs& args, int l, int slot, float* log_sum) {
  Prepare(sh, args, l, slot);
  // NOTE: rows of counts that are no multiple of four are read token by token.
  const bool has_fours = (reinterpret_cast<uintptr_t>(sh.shape.counts) & 7) == 0;
  while (true) {
    if (sh.shape.IsShaped()) MakeExtras(sh);
    Read(sh, args.num_tokens, has_fours);
    // NOTE: bans that leave nothing do not hold.
    if (!has_fours || !sh.shape.is_banning || sh.shaped.count > 0 || sh.reading.floor > -INFINITY) break;
    StopBanning(sh);
  }
  const Total& raw = sh.reading.raw;
  *log_sum = static_cast<float>(raw.reference * kLn2 + log(static_cast<double>(raw.sum)));
  WriteTop(sh, args, l, *log_sum);
  const int32_t target = args.row_target[l];
  if (target >= 0) return target;
  int32_t token = has_fours ? DrawFromLists(sh) : kUndecided;
  if (token != kUndecided) return token;
  while (true) {
    token = DrawSlowly(sh, WorkRow(args, l), static_cast<int>(WorkStride(args)));
    if (token != kBannedOut) return token;
    StopBanning(sh);
    if (sh.shape.raw == WorkRow(args, l)) CopyOfRow(args, l);
    MakeExtras(sh);
  }
}

__global__ void __launch_bounds__(kThreads, 1) SampleKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(16) uint8_t memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory);
  const int l = blockIdx.x;
  const int slot = args.row_token[l] < 0 ? -1 : args.seq_slot[args.row_seq[l]];
  if (slot < 0) {
    if (threadIdx.x < kTopLogits) {
      args.top_tokens[l * args.top_tokens_stride + threadIdx.x] = 0;
      args.top_logprobs[l * args.top_logprobs_stride + threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) args.out_tokens[l] = 0, args.out_logprobs[l] = 0;
    return;
  }
  float log_sum;
  const int32_t token = ScoreAndDraw(sh, args, l, slot, &log_sum);
  if (threadIdx.x == 0) {
    args.out_tokens[l] = token;
    args.out_logprobs[l] = args.logits[l * args.logits_stride + token] - log_sum;
  }
}

__device__ __forceinline__ int SlotOfRow(const SampleArgs& args, int l) {
  return args.row_token[l] < 0 ? -1 : args.seq_slot[args.row_seq[l]];
}
__device__ __forceinline__ bool IsSampled(const SampleArgs& args, int l) {
  return SlotOfRow(args, l) >= 0 && args.row_target[l] < 0;
}

// The sampled rows of one sequence, from `first` on: row i counts while drafts 0..i-1 were what was sampled; the slot
// forgets the drafts after.
__device__ void VerifySequence(const SampleArgs& args, int first) {
  const int s = args.row_seq[first], slot = args.seq_slot[s];
  int end = first + 1;
  while (end < args.num_rows && IsSampled(args, end) && args.row_seq[end] == s) ++end;
  const bool is_decode = args.seq_start[s] < 0;
  int last = is_decode ? first : end - 1;
  while (last + 1 < end && args.tokens[args.row_token[last] + 1] == args.out_tokens[last]) ++last;
  args.num_accepted[s] = is_decode ? last - first + 1 : 1;
  args.last_token[slot] = args.out_tokens[last];
  if (!is_decode) return;
  const int begin = args.row_token[last] + 1, rows_end = args.query_start[s + 1];
  if (rows_end > begin) args.length[slot] -= rows_end - begin;
  if (args.counts == nullptr) return;
  for (int row = begin; row < rows_end; ++row) {
    uint16_t* count = args.counts + slot * args.counts_stride + args.tokens[row];
    if ((*count & kGeneratedMask) != 0) --*count;
  }
}

// One block; one thread a sequence that samples. NOTE: a slot is one sequence's alone.
__global__ void VerifyDraftsKernel(SampleArgs args) {
  for (int s = threadIdx.x; s < args.num_sequences; s += blockDim.x) args.num_accepted[s] = 0;
  __syncthreads();
  for (int l = threadIdx.x; l < args.num_rows; l += blockDim.x) {
    if (!IsSampled(args, l)) continue;
    if (l == 0 || !IsSampled(args, l - 1) || args.row_seq[l - 1] != args.row_seq[l]) VerifySequence(args, l);
  }
}

}  // namespace

cudaError_t PrepareSampling() {
  return cudaFuncSetAttribute(SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
}

void LaunchSample(const SampleArgs& args, cudaStream_t stream) {
  SampleKernel<<<args.num_rows, kThreads, sizeof(Shared), stream>>>(args);
}

void LaunchVerifyDrafts(const SampleArgs& args, cudaStream_t stream) {
  VerifyDraftsKernel<<<1, 512, 0, stream>>>(args);
}

}  // namespace cachalot
