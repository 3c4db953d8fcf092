// Sampling: logits biased, penalised, masked and filtered, noise; log-probabilities of the raw logits; drafts verified.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/types/span.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/penalty_counts.h"
#include "kernels/cpu/sampling_kernels.h"

namespace cachalot {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t PaddedLogits(int64_t n) { return (n + kLogitBlock - 1) / kLogitBlock * kLogitBlock; }

// Ranks tokens by falling logit, ties by id: rank keys rise in that order.
uint64_t RankKey(float logit, int64_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // NOTE: -0 ranks as 0
  const uint32_t rising = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | static_cast<uint32_t>(id);
}

float LogitOfKey(uint64_t key) {
  const uint32_t rising = ~static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>((rising & 0x80000000u) != 0 ? rising & 0x7fffffffu : ~rising);
}

bool HasPenalties(const SlotParams& p) {
  return p.presence_penalty != 0 || p.frequency_penalty != 0 || p.repetition_penalty != 1;
}

float Penalized(float logit, uint16_t count, const SlotParams& p) {
  if (count == 0) return logit;
  const int generated = count & kGeneratedMask;
  logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
  logit -= p.frequency_penalty * static_cast<float>(generated);
  return generated > 0 ? logit - p.presence_penalty : logit;
}

// What a filter keeps: tokens whose key is at most this.
constexpr uint64_t kKeepAll = ~uint64_t{0};

// Keys of the tokens with a logit of at least `least`; how many.
int64_t CollectKeys(const float* logits, int64_t n, float least, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[count] = RankKey(logits[i], i);
    count += logits[i] >= least && logits[i] > -kInfinity ? 1 : 0;
  }
  return count;
}

// Cuts the nucleus off keys[0..count): the last key of the smallest prefix, in rank order, whose probabilities reach
// top_p of `total`, which is a sum of exp(logit - max). Sorts as far as it must.
uint64_t NucleusCut(uint64_t* keys, int64_t count, float max, double wanted) {
  double sum = 0;
  for (int64_t sorted = 0, end = 64; sorted < count; end *= 4) {
    end = std::min(end, count);
    if (end < count) std::nth_element(keys + sorted, keys + end, keys + count);
    std::sort(keys + sorted, keys + end);
    for (; sorted < end; ++sorted) {
      sum += std::exp(LogitOfKey(keys[sorted]) - max);
      if (sum >= wanted) return keys[sorted];
    }
  }
  return kKeepAll;
}

// top_k, then top_p of what it leaves, then min_p: the key of the last token that all of them keep.
uint64_t FilterCut(const float* logits, int64_t n, float max, const SlotParams& p, Arena arena) {
  uint64_t cut = kKeepAll;
  const bool has_top_k = p.top_k > 0 && p.top_k < n, has_top_p = p.top_p < 1;
  if (has_top_k || has_top_p) {
    uint64_t* keys = arena.Take<uint64_t>(n + 1);
    if (has_top_k) {
      // The k-th largest block maximum: at least k tokens reach it, and hardly more.
      const int64_t num_blocks = n / kLogitBlock;
      float least = -kInfinity;
      if (p.top_k <= num_blocks) {
        float* maxima = arena.Take<float>(num_blocks);
        BlockMaxima(logits, n, maxima);
        std::nth_element(maxima, maxima + p.top_k - 1, maxima + num_blocks, std::greater<float>());
        least = maxima[p.top_k - 1];
      }
      int64_t count = CollectKeys(logits, n, least, keys);
      if (count >= p.top_k) {
        std::nth_element(keys, keys + p.top_k - 1, keys + count);
        count = p.top_k;
        cut = keys[count - 1];
      }
      if (has_top_p) {
        std::sort(keys, keys + count);
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += std::exp(LogitOfKey(keys[i]) - max);
        cut = std::min(cut, NucleusCut(keys, count, max, p.top_p * total));
      }
    } else {
      // Tokens below (1 - top_p) / n of the mass cannot add up to what the nucleus leaves out.
      const float total = SumOfExp(logits, n, max);
      const float least = max + std::log((1 - p.top_p) * total / static_cast<float>(n)) - 1e-3f;
      cut = NucleusCut(keys, CollectKeys(logits, n, least, keys), max, static_cast<double>(p.top_p) * total);
    }
  }
  if (p.min_p > 0) {
    const float least = max + std::log(p.min_p);
    cut = std::min(cut, RankKey(least, std::numeric_limits<uint32_t>::max()));
  }
  return cut;
}

}  // namespace

struct CpuOps::SampleCall {
  const SampleOutput& out;
  const SlotState& state;
  const Tensor& logits;
  const Tensor& mask;
  const StepInput& input;
  const StepRows& rows;
  int64_t num_valid_tokens;

  int64_t num_tokens() const { return logits.dim(1); }
  int32_t token_row(int64_t l) const { return input.row_token.as<int32_t>()[l]; }
  int32_t sequence(int64_t l) const { return input.row_seq.as<int32_t>()[l]; }
  int32_t target(int64_t l) const { return input.row_target.as<int32_t>()[l]; }
  int32_t slot(int64_t l) const { return token_row(l) < 0 ? -1 : input.seq_slot.as<int32_t>()[sequence(l)]; }
  int32_t last_row(int64_t s) const { return input.query_start.as<int32_t>()[s + 1]; }
  // The slot's entries: those that are banned, or those that are biased.
  absl::Span<const TokenBias> BannedTokens(int64_t l, const SlotParams& params) const;
  absl::Span<const TokenBias> BiasedTokens(int64_t l, const SlotParams& params) const;
  float BiasedLogit(int64_t l, const SlotParams& params, int32_t token) const;
  void ApplyPenalties(int64_t l, const SlotParams& params, float* processed) const;
  void Process(int64_t l, const SlotParams& params, bool is_banning, float* processed) const;
  int32_t Draw(int64_t l, Arena arena) const;
};

absl::Span<const TokenBias> CpuOps::SampleCall::BannedTokens(int64_t l, const SlotParams& params) const {
  if (params.num_banned + params.num_biased == 0) return {};
  CHECK(!state.token_biases.empty() && params.num_banned + params.num_biased <= kMaxTokenBiases);
  return {reinterpret_cast<const TokenBias*>(state.token_biases.row<uint8_t>(slot(l))), params.num_banned};
}

absl::Span<const TokenBias> CpuOps::SampleCall::BiasedTokens(int64_t l, const SlotParams& params) const {
  return {BannedTokens(l, params).end(), params.num_biased};
}

float CpuOps::SampleCall::BiasedLogit(int64_t l, const SlotParams& params, int32_t token) const {
  for (const TokenBias& entry : BiasedTokens(l, params)) {
    if (entry.token == token) return logits.row<float>(l)[token] + entry.bias;
  }
  return logits.row<float>(l)[token];
}

// NOTE: BeginStep counted every row of the sequence; what follows this row (drafts) is not in its past.
void CpuOps::SampleCall::ApplyPenalties(int64_t l, const SlotParams& params, float* processed) const {
  const uint16_t* counts = state.counts.row<uint16_t>(slot(l));
  const int32_t* tokens = rows.tokens.as<int32_t>();
  for (int64_t i = 0; i < num_valid_tokens; ++i) processed[i] = Penalized(processed[i], counts[i], params);
  const int32_t begin = token_row(l) + 1, end = last_row(sequence(l));
  for (int32_t row = begin; row < end; ++row) {
    uint16_t count = counts[tokens[row]];
    for (int32_t other = begin; other < end; ++other) {
      if (tokens[other] == tokens[row]) UncountToken(&count);
    }
    processed[tokens[row]] = Penalized(BiasedLogit(l, params, tokens[row]), count, params);
  }
}

// The logits that the row draws from, before temperature; padded to a whole block.
void CpuOps::SampleCall::Process(int64_t l, const SlotParams& params, bool is_banning, float* processed) const {
  std::copy_n(logits.row<float>(l), num_tokens(), processed);
  for (const TokenBias& entry : BiasedTokens(l, params)) processed[entry.token] += entry.bias;
  if (HasPenalties(params) && !state.counts.empty()) ApplyPenalties(l, params, processed);
  std::fill(processed + num_valid_tokens, processed + PaddedLogits(num_tokens()), -kInfinity);
  if (!mask.empty()) {
    const uint32_t* allowed = mask.row<uint32_t>(l);
    for (int64_t i = 0; i < num_valid_tokens; ++i) {
      if ((allowed[i / 32] >> (i % 32) & 1) == 0) processed[i] = -kInfinity;
    }
  }
  if (!is_banning) return;
  for (const TokenBias& entry : BannedTokens(l, params)) processed[entry.token] = -kInfinity;
}

// The token of a row that samples.
int32_t CpuOps::SampleCall::Draw(int64_t l, Arena arena) const {
  SlotParams params;
  std::memcpy(&params, state.params.row<uint8_t>(slot(l)), sizeof(params));
  const int32_t position = rows.positions.as<int32_t>()[token_row(l)] + 1;
  const int64_t n = PaddedLogits(num_tokens());
  float* processed = arena.Take<float>(n);
  const bool is_banning = params.num_banned > 0 && position - params.prompt_tokens < params.min_tokens;
  Process(l, params, is_banning, processed);
  int32_t greedy = ArgMax(processed, n);
  if (is_banning && processed[greedy] == -kInfinity) {
    Process(l, params, false, processed);
    greedy = ArgMax(processed, n);
  }
  if (params.temperature == 0 || processed[greedy] == -kInfinity) return greedy;

  for (int64_t i = 0; i < num_valid_tokens; ++i) processed[i] /= params.temperature;
  const float max = processed[greedy];
  const uint64_t cut = FilterCut(processed, n, max, params, arena);
  if (cut != kKeepAll) {
    for (int64_t i = 0; i < num_valid_tokens; ++i) {
      if (RankKey(processed[i], i) > cut) processed[i] = -kInfinity;
    }
  }
  return GumbelArgMax(processed, n, max, {params.seed, params.choice, static_cast<uint32_t>(position)});
}

void CpuOps::SampleRow(const SampleCall& call, int64_t l, Arena arena) {
  const SampleOutput& out = call.out;
  int32_t* token = out.tokens.as<int32_t>() + l;
  float* logprob = out.logprobs.as<float>() + l;
  int32_t* top_tokens = out.top_tokens.row<int32_t>(l);
  float* top_logprobs = out.top_logprobs.row<float>(l);
  if (call.slot(l) < 0) {
    *token = 0;
    *logprob = 0;
    std::fill_n(top_tokens, kMaxTopLogprobs, 0);
    std::fill_n(top_logprobs, kMaxTopLogprobs, 0.0f);
    return;
  }
  const float* raw = call.logits.row<float>(l);
  const float log_sum = LogSumExp(raw, call.num_tokens());
  *token = call.target(l) >= 0 ? call.target(l) : call.Draw(l, arena);
  *logprob = raw[*token] - log_sum;
  TopLogits(raw, call.num_tokens(), kMaxTopLogprobs, top_tokens, top_logprobs);
  for (int i = 0; i < kMaxTopLogprobs; ++i) top_logprobs[i] -= log_sum;
}

// Row i of a decode sequence counts while drafts 0..i-1 were what was sampled; the slot forgets the drafts after.
void CpuOps::VerifyDrafts(const SampleCall& call) {
  const int64_t num_rows = call.logits.dim(0);
  const int32_t* tokens = call.rows.tokens.as<int32_t>();
  const int32_t* sampled = call.out.tokens.as<int32_t>();
  int32_t* num_accepted = call.out.num_accepted.as<int32_t>();
  std::fill_n(num_accepted, call.out.num_accepted.dim(0), 0);
  for (int64_t first = 0, end; first < num_rows; first = end) {
    end = first + 1;
    const int32_t slot = call.slot(first);
    if (slot < 0 || call.target(first) >= 0) continue;
    const int32_t s = call.sequence(first);
    while (end < num_rows && call.slot(end) >= 0 && call.sequence(end) == s && call.target(end) < 0) ++end;

    const bool is_decode = call.input.seq_start.as<int32_t>()[s] < 0;
    int64_t last = is_decode ? first : end - 1;
    while (last + 1 < end && tokens[call.token_row(last) + 1] == sampled[last]) ++last;
    num_accepted[s] = is_decode ? static_cast<int32_t>(last - first) + 1 : 1;
    call.state.last_token.as<int32_t>()[slot] = sampled[last];
    if (!is_decode) continue;
    for (int32_t row = call.token_row(last) + 1; row < call.last_row(s); ++row) {
      --call.state.length.as<int32_t>()[slot];
      if (!call.state.counts.empty()) UncountToken(call.state.counts.row<uint16_t>(slot) + tokens[row]);
    }
  }
}

void CpuOps::Sample(const SampleOutput& out, const SlotState& state, const Tensor& logits, const Tensor& mask,
                    const StepInput& input, const StepRows& rows, int num_valid_tokens) {
  const int64_t num_rows = logits.dim(0), num_tokens = logits.dim(1);
  CHECK_SHAPE(logits, num_rows, num_tokens);
  if (!mask.empty()) CHECK_SHAPE(mask, num_rows, (num_tokens + 31) / 32);
  CHECK_SHAPE(out.tokens, num_rows);
  CHECK_SHAPE(out.logprobs, num_rows);
  CHECK_SHAPE(out.top_tokens, num_rows, kMaxTopLogprobs);
  CHECK_SHAPE(out.top_logprobs, num_rows, kMaxTopLogprobs);
  CHECK_SHAPE(out.num_accepted, input.seq_slot.dim(0));
  CHECK_SHAPE(input.row_token, num_rows);
  CHECK_SHAPE(input.row_seq, num_rows);
  CHECK_SHAPE(input.row_target, num_rows);
  CHECK(num_valid_tokens <= num_tokens, "{} valid tokens of {}", num_valid_tokens, num_tokens);
  if (!state.counts.empty()) CHECK_SHAPE(state.counts, state.length.dim(0), num_tokens);
  const SampleCall call = {out, state, logits, mask, input, rows, num_valid_tokens};
  pool_.Run(num_rows, [&](int64_t l, int worker) { SampleRow(call, l, WorkerArena(worker)); });
  VerifyDrafts(call);
}

void CpuOps::ProposeDrafts(const Tensor& proposed, const StepRows& rows, const SlotState& state, const Tensor& logits,
                           const StepInput& drafts, int index, int num_valid_tokens) {
  const int64_t num_rows = logits.dim(0);
  CHECK_SHAPE(proposed, num_rows, state.drafts.dim(1));
  CHECK_SHAPE(rows.tokens, num_rows);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK_SHAPE(drafts.row_token, num_rows);
  CHECK_SHAPE(drafts.row_seq, num_rows);
  CHECK(index >= 0 && index < proposed.dim(1) && num_valid_tokens <= logits.dim(1), "draft {}", index);
  const SampleOutput unused;
  const SampleCall call = {unused, state, logits, unused.tokens, drafts, rows, num_valid_tokens};
  pool_.Run(num_rows, [&](int64_t l, int worker) {
    const int32_t slot = call.slot(l), token = slot < 0 ? 0 : call.Draw(l, WorkerArena(worker));
    proposed.row<int32_t>(l)[index] = token;
    if (slot < 0) return;
    state.drafts.row<int32_t>(slot)[index] = token;
    rows.tokens.as<int32_t>()[l] = token;
    ++rows.positions.as<int32_t>()[l];
  });
}

}  // namespace cachalot
