// The one reading of a row of logits: sums of exponentials, lists of the largest tokens, and those whose noise makes
// them likely to win. A sample of the row, read first, says what is large.
#ifndef CACHALOT_KERNELS_CUDA_SAMPLING_READ_CUH_
#define CACHALOT_KERNELS_CUDA_SAMPLING_READ_CUH_

#include "kernels/cuda/sampling_shape.cuh"

namespace cachalot {
namespace {

constexpr float kLog2e = 0x1.715476p0f;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr int kAhead = 8;                 // fours of logits that a thread has asked for
constexpr float kNoReference = -1e30f;    // of nothing above -inf
constexpr float kMostExponent = 100.0f;   // of a term of a sum: then the sum is scaled anew
constexpr float kLeastNoiseBits = -4.1f;  // the least noise is -2.82
constexpr float kRacers = 8.0f;           // as many tokens as 2 to this are to reach the race's bound
constexpr float kLeastRest = -24.0f;      // 1 - u is 2 to this or more

// Low and high half, by one instruction.
__device__ __forceinline__ uint2 WideProduct(uint32_t a, uint32_t b) {
  uint2 product;
  asm("{ .reg .u64 wide; mul.wide.u32 wide, %2, %3; mov.b64 {%0, %1}, wide; }"
      : "=r"(product.x), "=r"(product.y)
      : "r"(a), "r"(b));
  return product;
}

// Philox4x32-10 (Salmon et al., SC'11) of the counter {group, position, choice, 0}.
__device__ __forceinline__ uint4 Philox(uint32_t group, uint32_t position, uint32_t choice, uint64_t seed) {
  uint32_t x0 = group, x1 = position, x2 = choice, x3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint2 product0 = WideProduct(0xD2511F53u, x0), product1 = WideProduct(0xCD9E8D57u, x2);
    x0 = product1.y ^ x1 ^ key0;
    x1 = product1.x;
    x2 = product0.y ^ x3 ^ key1;
    x3 = product0.x;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(x0, x1, x2, x3);
}
__device__ __forceinline__ uint32_t WordOf(const uint4& words, uint32_t id) {
  return id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w;
}

__device__ __forceinline__ float Noise(uint32_t bits) {
  const float r = static_cast<float>(bits >> 9);
  return -logf(-logf((r + 0.5f) * 0x1p-23f));
}

// A sum of 2^(x * scale - reference) over tokens. The reference is one of the larger x * scale.
struct Sum {
  float scale, reference, sum = 0;
  float above = 0;  // what of the sum is of large exponents

  __device__ __forceinline__ float ExponentOf(float x) const { return fmaf(x, scale, -reference); }
  // Whether it took another reference.
  __device__ __forceinline__ bool MakeRoomFor(float largest) {
    if (!(ExponentOf(largest) > kMostExponent) || largest == INFINITY) return false;
    const float factor = FastExp2(reference - largest * scale);
    sum *= factor;
    above *= factor;
    reference = largest * scale;
    return true;
  }
  __device__ __forceinline__ float4 Add(const float4& x) {
    const float4 e = make_float4(FastExp2(ExponentOf(x.x)), FastExp2(ExponentOf(x.y)), FastExp2(ExponentOf(x.z)),
                                 FastExp2(ExponentOf(x.w)));
    sum += (e.x + e.y) + (e.z + e.w);
    return e;
  }
  // `least`: of the exponents that `above` sums.
  __device__ __forceinline__ float4 AddBoth(const float4& x, float least) {
    const float4 e = Add(x);
    if (ExponentOf(x.x) > least) above += e.x;
    if (ExponentOf(x.y) > least) above += e.y;
    if (ExponentOf(x.z) > least) above += e.z;
    if (ExponentOf(x.w) > least) above += e.w;
    return e;
  }
};

__device__ Total TotalOf(Shared& sh, const Sum& own) {
  const float reference = BlockMax(sh, own.reference);
  return {BlockSum(sh, own.sum * FastExp2(own.reference - reference)), reference};
}

// How many fours a thread meets at once: their noise is made side by side.
constexpr int kBatch = 4;

template <bool kShaped, bool kDraws>
struct Reader {
  Shared& sh;
  const Shape shape;
  const Draws draws;
  Reading out;
  Sum raw, drawn;
  float bound = 0;  // of the race, times log2(e)
  float race_exponent = 0, race_factor = 0;
  float sure = INFINITY;  // as Reading::sure_exponent, less the reference

  // NOTE: -log(u) >= 1 - u, so a token reaches the bound only if 1 - u <= 2^(its exponent + race_exponent).
  __device__ __forceinline__ void SetBound(float new_bound) {
    bound = new_bound;
    race_exponent = drawn.reference - bound + (0.02f + 1e-6f * (fabsf(bound) + 32.0f));
    race_factor = FastExp2(race_exponent);
    sure = out.sure_exponent - drawn.reference;
  }
  // NOTE: the largest token is never filtered, so the winner is no worse than it with the least noise.
  __device__ __forceinline__ void MeetLarge(float largest) {
    const bool is_new = drawn.MakeRoomFor(largest);
    const float other = largest * drawn.scale + kLeastNoiseBits;
    if (!is_new && !(other > bound)) return;
    if (other > bound) atomicMax(&sh.best, Rising(other));
    SetBound(fmaxf(bound, other));
  }

  // 1 + r * 2^-23 against the least of it that may reach the bound.
  __device__ __forceinline__ bool IsLucky(uint32_t bits, float mass) const {
    return __uint_as_float(__funnelshift_r(bits, 0x7fu, 9)) >= fmaf(-mass, race_factor, 2.0f - 0x1p-23f);
  }
  __device__ __forceinline__ uint4 NoiseOf(int group) const {
    return Philox(static_cast<uint32_t>(group), draws.position, draws.choice, draws.seed);
  }

  // Sums kBatch fours. A bit each: those that belong in lists; kAhead bits further: those that may win.
  __device__ __forceinline__ uint32_t Meet(const int (&groups)[kBatch], const float4* x, const uint2* counts) {
    float most = -INFINITY;
    uint32_t marks = 0;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float largest = MaxOf(x[j]);
      most = fmaxf(most, largest);
      if (largest > out.raw_floor) marks |= 1u << j;
    }
    if (most > out.raw_floor) {
      raw.MakeRoomFor(most);
      if (!kShaped && kDraws) MeetLarge(most);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) raw.Add(x[j]);
    if constexpr (kShaped) {
      float4 logits[kBatch];
      most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        logits[j] = Shaped(sh, groups[j], x[j], counts[j]);
        const float largest = MaxOf(logits[j]);
        most = fmaxf(most, largest);
        if (largest > out.floor) marks |= 1u << j;
      }
      if (kDraws && most > out.floor) MeetLarge(most);
      if constexpr (kDraws) marks |= MeetDrawn(groups, logits, most);
    } else if constexpr (kDraws) {
      marks |= MeetDrawn(groups, x, most);
    }
    return marks;
  }
  // `most`: the largest of the logits.
  __device__ __forceinline__ uint32_t MeetDrawn(const int (&groups)[kBatch], const float4* logits, float most) {
    float4 e[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) e[j] = drawn.AddBoth(logits[j], sure);
    if (!(drawn.ExponentOf(most) + race_exponent >= kLeastRest)) return 0;
    uint32_t marks = 0;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const uint4 words = NoiseOf(groups[j]);
      const bool is_lucky =
          IsLucky(words.x, e[j].x) | IsLucky(words.y, e[j].y) | IsLucky(words.z, e[j].z) | IsLucky(words.w, e[j].w);
      if (is_lucky) marks |= 1u << (kAhead + j);
    }
    return marks;
  }

  // Remembers the marked fours of a round; all threads look at them together in the end.
  template <typename GroupOf>
  __device__ __forceinline__ void Remember(uint32_t marks, GroupOf group_of) {
    uint32_t marked = (marks | marks >> kAhead) & ((1u << kAhead) - 1);
    if (marked == 0) return;
    int i = atomicAdd(&sh.num_marked, __popc(marked));
#pragma unroll 1
    for (; marked != 0; marked &= marked - 1, ++i) {
      const int j = __ffs(static_cast<int>(marked)) - 1;
      if (i < kMaxMarked) sh.marked[i] = static_cast<uint32_t>(group_of(j)) | (marks >> (kAhead + j) & 1) << 31;
    }
  }

  __device__ __forceinline__ void ListFour(List& list, float floor, int group, const float4& x) {
    const bool is_in[4] = {x.x > floor, x.y > floor, x.z > floor, x.w > floor};
    const int count = is_in[0] + is_in[1] + is_in[2] + is_in[3];
    if (count == 0) return;
    int i = atomicAdd(&list.count, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (is_in[j] && i < kListSize) list.keys[i] = RankKey(Element(x, j), static_cast<uint32_t>(4 * group + j));
      i += is_in[j];
    }
  }
  __device__ __forceinline__ bool MayWin(float x, uint32_t bits) const {
    return x > -INFINITY && IsLucky(bits, FastExp2(drawn.ExponentOf(x)));
  }
  __device__ __forceinline__ void Race(int id, float x, uint32_t bits) {
    const float logit = x / draws.temperature, value = logit + Noise(bits);
    if (!(value >= out.race_floor)) return;
    const int i = atomicAdd(&sh.race_count, 1);
    if (i >= kRaceSize) return;
    sh.race[i] = static_cast<uint64_t>(Rising(value)) << 32 | ~static_cast<uint32_t>(id);
    sh.race_logits[i] = logit;
  }

  // The marked fours into lists.
  __device__ __forceinline__ void Enlist() {
    if (kDraws) SetBound(FloatOfRising(sh.best));
    const int count = sh.num_marked;
    if (count > kMaxMarked) {
      if (threadIdx.x == 0) sh.raw.count = sh.shaped.count = kMoreThanListed, sh.race_count = kRaceSize + 1;
      return;
    }
    constexpr int kAtOnce = 1;
#pragma unroll 1
    for (int base = threadIdx.x; base < count; base += kAtOnce * kThreads) {
      float4 x[kAtOnce];
      uint2 counts[kAtOnce];
      uint32_t marked[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j * kThreads;
        if (i >= count) continue;
        marked[j] = sh.marked[i];
        x[j] = LoadRaw(shape, static_cast<int>(marked[j] & 0x7fffffffu));
        counts[j] = kShaped ? LoadCounts(shape, static_cast<int>(marked[j] & 0x7fffffffu)) : make_uint2(0, 0);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (base + j * kThreads >= count) continue;
        const int group = static_cast<int>(marked[j] & 0x7fffffffu);
        ListFour(sh.raw, out.raw_floor, group, x[j]);
        const float4 logits = kShaped ? Shaped(sh, group, x[j], counts[j]) : x[j];
        if (kShaped) ListFour(sh.shaped, out.floor, group, logits);
        if (!kDraws || marked[j] >> 31 == 0) continue;
        const uint4 words = NoiseOf(group);
        uint32_t racers = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) racers |= MayWin(Element(logits, k), WordOf(words, k)) ? 1u << k : 0;
#pragma unroll 1
        for (; racers != 0; racers &= racers - 1) {
          const int k = __ffs(static_cast<int>(racers)) - 1;
          Race(4 * group + k, Element(logits, k), WordOf(words, k));
        }
      }
    }
  }

  // Tokens that are in no four.
  __device__ void RawToken(int id, float x) {
    raw.MakeRoomFor(x);
    raw.Add(make_float4(x, -INFINITY, -INFINITY, -INFINITY));
    if (x > out.raw_floor) AddToList(sh.raw, x, static_cast<uint32_t>(id));
  }
  __device__ void DrawnToken(int id, float x) {
    if (kShaped && x > out.floor) AddToList(sh.shaped, x, static_cast<uint32_t>(id));
    if (!kDraws) return;
    MeetLarge(x);
    drawn.AddBoth(make_float4(x, -INFINITY, -INFINITY, -INFINITY), sure);
    const uint32_t bits = WordOf(NoiseOf(id / 4), id);
    if (MayWin(x, bits)) Race(id, x, bits);
  }
};

// Of every warp its largest value, and of its lanes' values the one that `rank` others are not less than.
__device__ __forceinline__ void WriteWarpRange(float x, int rank, float* maxima, float* ranked) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float largest = WarpMax(x);
  if (lane == 0) maxima[warp] = largest;
  for (; rank > 0; --rank) {
    const uint32_t owners = __ballot_sync(0xffffffffu, x == largest);
    if (lane == __ffs(static_cast<int>(owners)) - 1) x = -INFINITY;
    largest = WarpMax(x);
  }
  if (lane == 0) ranked[warp] = largest;
}
// The least of what is ranked, and the largest of all.
__device__ __forceinline__ float2 RangeOf(const float* maxima, const float* ranked) {
  return {-WarpMax(-ranked[threadIdx.x % kWarps]), WarpMax(maxima[threadIdx.x % kWarps])};
}

// A guess from a sample of tokens: an exponent above which there is somewhat less than top_p of the mass. `e`:
// 2^exponent of four of the thread's tokens, at most 1.
__device__ __forceinline__ float GuessSureExponent(Shared& sh, const float4& x, const Sum& sum) {
  constexpr float kBinsPerExponent = 8, kMassUnit = 1 << 19, kShare = 0.94f;
  constexpr int kGuessBins = 256, kPerLane = kGuessBins / kWarpSize;
  for (int i = threadIdx.x; i < kGuessBins; i += kThreads) sh.low[i] = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float exponent = sum.ExponentOf(Element(x, j));
    if (!(exponent >= -16.0f)) continue;
    const int bin = min(kGuessBins - 1, static_cast<int>(fmaxf(-exponent, 0.0f) * kBinsPerExponent));
    atomicAdd(&sh.low[bin], static_cast<uint32_t>(FastExp2(fminf(exponent, 0.0f)) * kMassUnit));
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  uint32_t masses[kPerLane], own = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) own += masses[j] = sh.low[kPerLane * lane + j];
  const uint32_t scanned = WarpScan(own), total = __shfl_sync(0xffffffffu, scanned, kWarpSize - 1);
  const auto wanted = static_cast<uint32_t>(sh.params.top_p * kShare * static_cast<float>(total));
  uint32_t before = scanned - own;
  int count = 0;  // of bins that are sure
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    before += masses[j];
    count += before <= wanted ? 1 : 0;
  }
  count = __reduce_add_sync(0xffffffffu, count);
  return -static_cast<float>(count) / kBinsPerExponent;
}

// sh.reading and the lists <- of sh.shape's row. `num_tokens`: those of the row, of which the last may be none to draw.
template <bool kShaped, bool kDraws>
__device__ __forceinline__ void ReadRow(Shared& sh, int num_tokens) {
  Reader<kShaped, kDraws> reader{sh, sh.shape, sh.draws, {}, {kLog2e, 0}, {sh.draws.scale, 0}};
  const Shape& shape = reader.shape;
  Reading& out = reader.out;
  const int num_groups = shape.num_valid / 4;
  // Fours of a thread lie far apart, so that the first of them are a sample of the row. About 430 tokens are above the
  // least of the warps' maxima in an eighth of the row, at least 500 above the least of their fourth values.
  const int segment = num_groups / (kAhead * kThreads) * kThreads;
  // The thread's fours of a round; the last round has what is left.
  struct Round {
    int first, step;
    bool is_rest;
    __device__ __forceinline__ int GroupOf(int j) const { return first + j * step; }
  };
  const auto round_at = [&](int i) {
    return i < segment ? Round{i, segment, false} : Round{(kAhead - 1) * segment + i, kThreads, true};
  };
  float4 x[kAhead];
  uint2 counts[kAhead];
  const auto load = [&](int j, const Round& round) {
    const int group = round.GroupOf(j);
    if (round.is_rest) {
      x[j] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY), counts[j] = make_uint2(0, 0);
      if (group >= num_groups) return;
    }
    x[j] = LoadRaw(shape, group);
    counts[j] = kShaped ? LoadCounts(shape, group) : make_uint2(0, 0);
  };
  if (threadIdx.x == 0) sh.raw.count = sh.shaped.count = sh.race_count = sh.num_marked = 0;

  // The sample: the first round. A row of few tokens is all sample.
  float raw_max = -INFINITY, drawn_max = -INFINITY;
#pragma unroll
  for (int j = 0; j < kAhead; ++j) load(j, round_at(threadIdx.x));
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    raw_max = fmaxf(raw_max, MaxOf(x[j]));
    if (!kShaped) continue;
    const int group = min(round_at(threadIdx.x).GroupOf(j), num_groups);
    drawn_max = fmaxf(drawn_max, MaxOf(Shaped(sh, group, x[j], counts[j])));
  }
  WriteWarpRange(raw_max, sh.draws.floor_rank, sh.floats, sh.floats + kWarps);
  if (kShaped) WriteWarpRange(drawn_max, sh.draws.floor_rank, sh.more_floats, sh.more_floats + kWarps);
  __syncthreads();
  const auto reference_of = [](float largest, float scale) {
    return largest > -INFINITY ? largest * scale : kNoReference;
  };
  const float2 raw_range = RangeOf(sh.floats, sh.floats + kWarps);
  const float2 range = kShaped ? RangeOf(sh.more_floats, sh.more_floats + kWarps) : raw_range;
  out.raw_floor = raw_range.x, out.floor = range.x;
  reader.raw.reference = reference_of(raw_range.y, kLog2e);
  reader.drawn.reference = reference_of(range.y, sh.draws.scale);
  out.sure_exponent = INFINITY;
  if (kDraws) {
    Sum sample = reader.drawn;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int group = min(round_at(threadIdx.x).GroupOf(j), num_groups);
      sample.Add(kShaped ? Shaped(sh, group, x[j], counts[j]) : x[j]);
    }
    const int num_sampled = segment > 0 ? kAhead * kThreads : num_groups;
    const float sum = BlockSum(sh, sample.sum) * (static_cast<float>(num_groups) / static_cast<float>(num_sampled));
    const float bound = sum > 0 ? reader.drawn.reference + log2f(sum) - kRacers : kNoReference;
    out.race_floor = sum > 0 ? bound * static_cast<float>(kLn2) : -INFINITY;
    if (threadIdx.x == 0) sh.best = Rising(bound);
    if (sh.params.top_p < 1 && sum > 0) {
      const float4 first = kShaped ? Shaped(sh, min(static_cast<int>(threadIdx.x), num_groups), x[0], counts[0]) : x[0];
      out.sure_exponent = reader.drawn.reference + GuessSureExponent(sh, first, reader.drawn);
    }
    reader.SetBound(bound);
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < segment + kThreads; i += kThreads) {
    if (kDraws) reader.SetBound(FloatOfRising(*static_cast<volatile uint32_t*>(&sh.best)));
    uint32_t marks = 0;
    const Round round = round_at(i), next = round_at(i + kThreads);
#pragma unroll
    for (int first = 0; first < kAhead; first += kBatch) {
      int groups[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) groups[j] = min(round.GroupOf(first + j), num_groups);
      marks |= reader.Meet(groups, x + first, counts + first) << first;
      if (i < segment) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) load(first + j, next);
      }
    }
    reader.Remember(marks, [&](int j) { return round.GroupOf(j); });
  }
  // Less than a four of tokens that exist, and rows of the vocabulary without a token.
#pragma unroll 1
  for (int id = 4 * num_groups + threadIdx.x; id < num_tokens; id += kThreads) {
    const float logit = shape.raw[id];
    reader.RawToken(id, logit);
    if (id < shape.num_valid && (kShaped || kDraws)) reader.DrawnToken(id, ShapedToken(sh, shape, id, logit));
  }
#pragma unroll 1
  for (int i = threadIdx.x; kShaped && i < sh.num_extras; i += kThreads) {
    reader.DrawnToken(sh.extras[i].token, sh.extras[i].logit);
  }
  __syncthreads();
  reader.Enlist();
  out.raw = TotalOf(sh, reader.raw);
  if (kDraws) {
    out.drawn = TotalOf(sh, reader.drawn);
    out.above_sure = BlockSum(sh, reader.drawn.above * FastExp2(reader.drawn.reference - out.drawn.reference));
  }
  if (threadIdx.x == 0) sh.reading = out;
  __syncthreads();
}

}  // namespace
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_SAMPLING_READ_CUH_
