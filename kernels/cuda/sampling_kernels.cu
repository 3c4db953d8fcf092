// Sampling kernels: one block a row of logits; then one block that verifies drafts.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/sampling_kernels.h"
#include "kernels/cuda/sampling_rank.cuh"

namespace cachalot {
namespace {

// With u = (r + 0.5) * 2^-23 the noise -log(-log(u)) lies in (-2.82, 16.64).
constexpr float kNoiseSpan = 20.0f;
constexpr float kLeastNoise = -2.83f;
constexpr float kMostNoise = 16.7f;
constexpr uint32_t kGeneratedMask = 0x7fff;  // of a count; the bit above is the prompt's

// Lists a row's raw logits that may be among the 20 largest, in a pass that is made anyway; a floor of NaN lists none.
struct TopCollector {
  Shared& sh;
  float floor;

  __device__ __forceinline__ void Add(int group, const float4& v) {
    if (!(MaxOf(v) >= floor)) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x = Element(v, j);
      if (x >= floor && x > -INFINITY) AddToList(sh, x, static_cast<uint32_t>(4 * group + j));
    }
  }
};

// The 20 largest raw logits: the list holds all that reach the 20th, or has overflown.
__device__ void WriteTop(Shared& sh, const SampleArgs& args, int l, const Row& raw, float max, float log_sum) {
  const uint64_t* keys = sh.list;
  int count = sh.list_count;
  if (count > kRankedSize) {
    const Source source = {raw, -INFINITY, count <= kListSize};
    const uint64_t cut = Descend(sh, source, {false, 0, 0}, kTopLogits, RankKey(max, 0), kLastKey);
    if (threadIdx.x == 0) sh.top_count = 0;
    __syncthreads();
    ForEachKey(sh, source, [&](uint64_t key) {
      if (key > cut) return;
      const int i = atomicAdd(&sh.top_count, 1);
      if (i < kTopLogits) sh.top[i] = key;
    });
    __syncthreads();
    keys = sh.top;
    count = min(sh.top_count, kTopLogits);
  }
  int32_t* ids = args.top_tokens + l * args.top_tokens_stride;
  float* logprobs = args.top_logprobs + l * args.top_logprobs_stride;
  const int i = threadIdx.x;
  if (i < count) {
    const uint64_t key = keys[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += keys[j] < key ? 1 : 0;
    if (rank < kTopLogits) {
      ids[rank] = static_cast<int32_t>(static_cast<uint32_t>(key));
      logprobs[rank] = LogitOfKey(key) - log_sum;
    }
  } else if (i < kTopLogits) {
    ids[i] = -1;
    logprobs[i] = -INFINITY;
  }
  __syncthreads();
}

// A row that samples: what shapes it.
struct Draw {
  const float* raw;
  float* processed;
  const uint16_t* counts;  // null: no penalties
  const uint32_t* mask;    // null: all are allowed
  const BiasEntry *banned, *biased;
  int num_banned, num_biased;
  int first_later, last_later;  // rows of the sequence after this one
  float divisor;
  bool is_banning;
  int num_valid;
  const int32_t* row_tokens;

  __device__ bool IsShaped() const { return counts != nullptr || mask != nullptr || num_biased > 0 || is_banning; }
};

__device__ __forceinline__ float Penalized(float logit, uint32_t count, const DrawParams& p) {
  if (count == 0) return logit;
  const int generated = static_cast<int>(count & kGeneratedMask);
  logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
  logit -= p.frequency_penalty * static_cast<float>(generated);
  return generated > 0 ? logit - p.presence_penalty : logit;
}

__device__ __forceinline__ bool IsAllowed(const Draw& draw, int id) {
  return draw.mask == nullptr || (draw.mask[id / 32] >> (id % 32) & 1) != 0;
}

// One token's logit to draw from, but for bans.
__device__ void ProcessToken(const Draw& draw, const DrawParams& p, int id, float logit, uint32_t count) {
  if (draw.counts != nullptr) logit = Penalized(logit, count, p);
  draw.processed[id] = IsAllowed(draw, id) ? logit / draw.divisor : -INFINITY;
}

// Tokens that are not like others: biased ones, later drafts, banned ones.
__device__ void ProcessSpecialTokens(const Draw& draw, const DrawParams& p) {
  __syncthreads();
  for (int i = threadIdx.x; i < draw.num_biased; i += kThreads) {
    const BiasEntry entry = draw.biased[i];
    if (entry.token < 0 || entry.token >= draw.num_valid) continue;
    const uint32_t count = draw.counts != nullptr ? draw.counts[entry.token] : 0;
    ProcessToken(draw, p, entry.token, draw.raw[entry.token] + entry.bias, count);
  }
  __syncthreads();
  // NOTE: BeginStep counted every row of the sequence; what follows this row (drafts) is not in its past.
  for (int row = draw.first_later + threadIdx.x; draw.counts != nullptr && row < draw.last_later; row += kThreads) {
    const int token = draw.row_tokens[row];
    if (token < 0 || token >= draw.num_valid) continue;
    uint32_t count = draw.counts[token];
    for (int other = draw.first_later; other < draw.last_later; ++other) {
      if (draw.row_tokens[other] == token && (count & kGeneratedMask) != 0) --count;
    }
    float logit = draw.raw[token];
    for (int i = 0; i < draw.num_biased; ++i) {
      if (draw.biased[i].token == token) {
        logit += draw.biased[i].bias;
        break;
      }
    }
    ProcessToken(draw, p, token, logit, count);
  }
  __syncthreads();
  for (int i = threadIdx.x; draw.is_banning && i < draw.num_banned; i += kThreads) {
    const int token = draw.banned[i].token;
    if (token >= 0 && token < draw.num_valid) draw.processed[token] = -INFINITY;
  }
  __syncthreads();
}

// Four ids' logits to draw from; special tokens come after. NOTE: what is only read goes through __ldg, so that loads
// need not wait for the stores before them.
__device__ __forceinline__ void ProcessGroup(const Draw& draw, const DrawParams& p, int group, const float4& v,
                                             bool is_aligned) {
  const int id = 4 * group;
  float x[4] = {v.x, v.y, v.z, v.w};
  const bool is_whole = is_aligned && id + 4 <= draw.num_valid;
  if (id >= draw.num_valid) return;
  if (draw.counts != nullptr) {
    uint32_t counts[4] = {};
    if (is_whole && (reinterpret_cast<uintptr_t>(draw.counts) & 7) == 0) {
      const ushort4 c = __ldg(reinterpret_cast<const ushort4*>(draw.counts + id));
      counts[0] = c.x, counts[1] = c.y, counts[2] = c.z, counts[3] = c.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (id + j < draw.num_valid) counts[j] = draw.counts[id + j];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = Penalized(x[j], counts[j], p);
  }
  const uint32_t allowed = draw.mask != nullptr ? __ldg(draw.mask + id / 32) >> (id % 32) : 0xfu;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (draw.divisor != 1.0f) x[j] /= draw.divisor;
    if ((allowed >> j & 1) == 0) x[j] = -INFINITY;
  }
  if (is_whole) {
    *reinterpret_cast<float4*>(draw.processed + id) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (id + j < draw.num_valid) draw.processed[id + j] = x[j];
  }
}

__device__ void Process(const Row& raw, const Draw& draw, const DrawParams& p, TopCollector top) {
  const bool is_aligned = raw.is_aligned && (reinterpret_cast<uintptr_t>(draw.processed) & 15) == 0;
  ForEachGroup<4>(raw, [&](int group, const float4& v) {
    top.Add(group, v);
    ProcessGroup(draw, p, group, v, is_aligned);
  });
  ProcessSpecialTokens(draw, p);
}

// Of a row that nothing shapes.
__device__ Stats StatsOfRaw(Shared& sh, const Row& raw, const Draw& draw, TopCollector top) {
  Running running;
  ForEachGroup<4>(raw, [&](int group, const float4& v) {
    top.Add(group, v);
    float4 x = v;
    Divide(x, draw.divisor);
    const int num_valid = draw.num_valid - 4 * group;
    if (num_valid < 4) {
      x.x = num_valid > 0 ? x.x : -INFINITY;
      x.y = num_valid > 1 ? x.y : -INFINITY;
      x.z = num_valid > 2 ? x.z : -INFINITY;
      x.w = -INFINITY;
    }
    running.Add(group, x);
  });
  return BlockStats(sh, running);
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
  sh.list[threadIdx.x] = RankKey(stats.thread_max, threadIdx.x);
  if (threadIdx.x == 0) sh.list_count = kThreads;
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
__device__ uint64_t NucleusCut(Shared& sh, const Source& source, const Stats& stats, const DrawParams& p,
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

// Philox4x32-10 (Salmon et al., SC'11) of the counter {group, position, choice, 0}.
__device__ __forceinline__ uint4 Philox(uint32_t group, uint32_t position, uint32_t choice, uint64_t seed) {
  uint32_t x0 = group, x1 = position, x2 = choice, x3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t low0 = 0xD2511F53u * x0, high0 = __umulhi(0xD2511F53u, x0);
    const uint32_t low1 = 0xCD9E8D57u * x2, high1 = __umulhi(0xCD9E8D57u, x2);
    x0 = high1 ^ x1 ^ key0;
    x1 = low1;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(x0, x1, x2, x3);
}

// The arg-max of noisy logits, kept as a key that rises with the value and falls with the id.
struct Race {
  uint64_t best = 0;

  // NOTE: -log(u) >= 1 - u, so the noise is at most -log(1 - u): most tokens are out without a logarithm.
  __device__ __forceinline__ void Enter(Shared& sh, float x, uint32_t id, uint32_t bits, float bound) {
    const float r = static_cast<float>(bits >> 9);
    const float rest = ((8388607.0f - r) + 0.5f) * 0x1p-23f;  // 1 - u, exactly
    if (rest > __expf(x - bound + (0.01f + 1e-6f * fabsf(bound)))) return;
    const float value = x - logf(-logf((r + 0.5f) * 0x1p-23f));
    const uint32_t rising = Rising(value);
    const uint64_t key = static_cast<uint64_t>(rising) << 32 | ~id;
    if (key <= best) return;
    best = key;
    if (rising > *static_cast<volatile uint32_t*>(&sh.best)) atomicMax(&sh.best, rising);
  }
};

__device__ int32_t GumbelArgMax(Shared& sh, const Source& source, uint64_t cut, const Stats& stats, const DrawParams& p,
                                uint32_t position) {
  __syncthreads();
  // NOTE: the largest logit is always kept, so the winner is no worse than it with the least noise.
  if (threadIdx.x == 0) sh.best = Rising(stats.max + kLeastNoise);
  __syncthreads();
  const volatile uint32_t* shared_best = &sh.best;
  Race race;
  if (source.is_listed) {
    for (int i = threadIdx.x; i < sh.list_count; i += kThreads) {
      const uint64_t key = sh.list[i];
      const uint32_t id = static_cast<uint32_t>(key);
      const float x = LogitOfKey(key), bound = FloatOfRising(*shared_best);
      if (key > cut || x + kMostNoise < bound) continue;
      const uint4 words = Philox(id / 4, position, p.choice, p.seed);
      race.Enter(sh, x, id, id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w, bound);
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
        race.Enter(sh, x, id + j, j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w, bound);
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
  const bool has_top_k = p.top_k > 0 && p.top_k < row.count, has_top_p = p.top_p < 1;
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
      const float share = (1 - fmaxf(p.top_p, 0.0f)) * stats.sum / static_cast<float>(row.count);
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

__device__ Draw MakeDraw(const SampleArgs& args, int l, int slot, const DrawParams& p, uint32_t position) {
  Draw draw = {};
  draw.raw = args.logits + l * args.logits_stride;
  draw.processed = args.processed + static_cast<int64_t>(l) * args.num_tokens;
  const bool has_penalties = p.presence_penalty != 0 || p.frequency_penalty != 0 || p.repetition_penalty != 1;
  if (has_penalties && args.counts != nullptr) draw.counts = args.counts + slot * args.counts_stride;
  if (args.mask != nullptr) draw.mask = args.mask + l * args.mask_stride;
  if (args.token_biases != nullptr) {
    draw.banned = reinterpret_cast<const BiasEntry*>(args.token_biases + slot * args.token_biases_stride);
    draw.num_banned = p.num_banned;
    draw.biased = draw.banned + p.num_banned;
    draw.num_biased = p.num_biased;
  }
  draw.first_later = args.row_token[l] + 1;
  draw.last_later = args.query_start[args.row_seq[l] + 1];
  draw.row_tokens = args.tokens;
  draw.divisor = p.temperature == 0 ? 1.0f : p.temperature;
  draw.is_banning = draw.num_banned > 0 && static_cast<int32_t>(position) - p.prompt_tokens < p.min_tokens;
  draw.num_valid = args.num_valid_tokens;
  return draw;
}

// The token of a row that samples; `raw_stats` are of its raw logits. Writes the 20 largest on the way.
__device__ int32_t DrawToken(Shared& sh, const SampleArgs& args, int l, int slot, const Row& raw,
                             const Stats& raw_stats, float log_sum) {
  const float top_floor = sh.floor;
  ClearList(sh);
  constexpr int kWords = sizeof(DrawParams) / sizeof(uint32_t);
  if (threadIdx.x < kWords) {
    const uint8_t* params = args.params + slot * args.params_stride;
    reinterpret_cast<uint32_t*>(&sh.params)[threadIdx.x] = reinterpret_cast<const uint32_t*>(params)[threadIdx.x];
  }
  __syncthreads();
  const DrawParams& p = sh.params;
  const uint32_t position = static_cast<uint32_t>(args.positions[args.row_token[l]]) + 1;
  Draw draw = MakeDraw(args, l, slot, p, position);
  Row row = MakeRow(draw.raw, draw.num_valid, draw.divisor);
  Stats stats;
  if (draw.IsShaped()) {
    Process(raw, draw, p, {sh, top_floor});
    WriteTop(sh, args, l, raw, raw_stats.max, log_sum);
    row = MakeRow(draw.processed, draw.num_valid, 1.0f);
    stats = StatsOf(sh, row);
  } else {
    stats = StatsOfRaw(sh, raw, draw, {sh, top_floor});
    WriteTop(sh, args, l, raw, raw_stats.max, log_sum);
  }
  if (draw.is_banning && stats.max == -INFINITY) {
    draw.is_banning = false;
    Process(raw, draw, p, {sh, NAN});
    stats = StatsOf(sh, row);
  }
  if (stats.max == -INFINITY) return 0;
  // NOTE: a greedy row was not divided by its temperature: no tie is made.
  if (p.temperature == 0) return static_cast<int32_t>(static_cast<uint32_t>(stats.best));
  return FilterAndDraw(sh, row, stats, p, position);
}

__global__ void __launch_bounds__(kThreads, 1) SampleKernel(SampleArgs args) {
  __shared__ Shared sh;
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
  const Row raw = MakeRow(args.logits + l * args.logits_stride, args.num_tokens, 1.0f);
  const Stats stats = StatsOf(sh, raw);
  const float log_sum = stats.max + logf(stats.sum);
  int32_t token = args.row_target[l];
  if (token < 0) {
    token = DrawToken(sh, args, l, slot, raw, stats, log_sum);
  } else {
    MakeList(sh, {raw, sh.floor, false}, 0, kKeepAll);
    WriteTop(sh, args, l, raw, stats.max, log_sum);
  }
  if (threadIdx.x == 0) {
    args.out_tokens[l] = token;
    args.out_logprobs[l] = raw.values[token] - log_sum;
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

void LaunchSample(const SampleArgs& args, cudaStream_t stream) {
  SampleKernel<<<args.num_rows, kThreads, 0, stream>>>(args);
}

void LaunchVerifyDrafts(const SampleArgs& args, cudaStream_t stream) {
  VerifyDraftsKernel<<<1, 512, 0, stream>>>(args);
}

}  // namespace cachalot
