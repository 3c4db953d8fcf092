// Sample: checks, then one block a row; drafts verified.
#include <cstddef>
#include <cstring>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/drafts_kernels.h"
#include "kernels/cuda/sampling_kernels.h"

namespace cachalot {
namespace {

static_assert(sizeof(DrawParams) == sizeof(SlotParams));
#define CACHALOT_SAME_PLACE(field) static_assert(offsetof(DrawParams, field) == offsetof(SlotParams, field))
CACHALOT_SAME_PLACE(apply);
CACHALOT_SAME_PLACE(prompt_tokens);
CACHALOT_SAME_PLACE(temperature);
CACHALOT_SAME_PLACE(top_k);
CACHALOT_SAME_PLACE(top_p);
CACHALOT_SAME_PLACE(min_p);
CACHALOT_SAME_PLACE(presence_penalty);
CACHALOT_SAME_PLACE(frequency_penalty);
CACHALOT_SAME_PLACE(repetition_penalty);
CACHALOT_SAME_PLACE(min_tokens);
CACHALOT_SAME_PLACE(num_banned);
CACHALOT_SAME_PLACE(num_biased);
CACHALOT_SAME_PLACE(choice);
CACHALOT_SAME_PLACE(seed);
#undef CACHALOT_SAME_PLACE
static_assert(sizeof(BiasEntry) == sizeof(TokenBias) && offsetof(BiasEntry, bias) == offsetof(TokenBias, bias));
static_assert(kTopLogits == kMaxTopLogprobs && kMaxTokenEntries == kMaxTokenBiases);

void CheckSample(const SampleOutput& out, const SlotState& state, const Tensor& logits, const Tensor& mask,
                 const StepInput& input, const StepRows& rows, int num_valid_tokens) {
  const int64_t num_rows = logits.dim(0), num_tokens = logits.dim(1);
  const int64_t num_sequences = input.seq_slot.dim(0), num_slots = state.length.dim(0);
  CHECK_SHAPE(logits, num_rows, num_tokens);
  if (!mask.empty()) CHECK_SHAPE(mask, num_rows, (num_tokens + 31) / 32);
  CHECK_SHAPE(out.tokens, num_rows);
  CHECK_SHAPE(out.logprobs, num_rows);
  CHECK_SHAPE(out.top_tokens, num_rows, kMaxTopLogprobs);
  CHECK_SHAPE(out.top_logprobs, num_rows, kMaxTopLogprobs);
  CHECK_SHAPE(out.num_accepted, num_sequences);
  CHECK_SHAPE(input.seq_start, num_sequences);
  CHECK_SHAPE(input.query_start, num_sequences + 1);
  CHECK_SHAPE(input.row_token, num_rows);
  CHECK_SHAPE(input.row_seq, num_rows);
  CHECK_SHAPE(input.row_target, num_rows);
  CHECK_SHAPE(rows.positions, rows.tokens.dim(0));
  CHECK_SHAPE(state.last_token, num_slots);
  CHECK_SHAPE(state.params, num_slots, sizeof(SlotParams));
  if (!state.counts.empty()) CHECK_SHAPE(state.counts, num_slots, num_tokens);
  if (!state.token_biases.empty()) CHECK_SHAPE(state.token_biases, num_slots, kMaxTokenBiases, sizeof(TokenBias));
  CHECK(num_valid_tokens <= num_tokens, "{} valid tokens of {}", num_valid_tokens, num_tokens);
  CHECK(num_tokens <= kMaxSampledVocab, "{} tokens", num_tokens);
}

SampleArgs ArgsOf(const SampleOutput& out, const SlotState& state, const Tensor& logits, const Tensor& mask,
                  const StepInput& input, const StepRows& rows) {
  SampleArgs args = {};
  args.out_tokens = out.tokens.as<int32_t>();
  args.out_logprobs = out.logprobs.as<float>();
  args.top_tokens = out.top_tokens.as<int32_t>();
  args.top_tokens_stride = out.top_tokens.row_stride;
  args.top_logprobs = out.top_logprobs.as<float>();
  args.top_logprobs_stride = out.top_logprobs.row_stride;
  args.num_accepted = out.num_accepted.as<int32_t>();
  args.length = state.length.as<int32_t>();
  args.last_token = state.last_token.as<int32_t>();
  args.params = state.params.as<uint8_t>();
  args.params_stride = state.params.row_stride;
  if (!state.counts.empty()) args.counts = state.counts.as<uint16_t>();
  args.counts_stride = state.counts.row_stride;
  if (!state.token_biases.empty()) args.token_biases = state.token_biases.as<uint8_t>();
  args.token_biases_stride = state.token_biases.row_stride;
  args.logits = logits.as<float>();
  args.logits_stride = logits.row_stride;
  if (!mask.empty()) args.mask = mask.as<uint32_t>();
  args.mask_stride = mask.row_stride;
  args.seq_slot = input.seq_slot.as<int32_t>();
  args.seq_start = input.seq_start.as<int32_t>();
  args.query_start = input.query_start.as<int32_t>();
  args.row_token = input.row_token.as<int32_t>();
  args.row_seq = input.row_seq.as<int32_t>();
  args.row_target = input.row_target.as<int32_t>();
  args.tokens = rows.tokens.as<int32_t>();
  args.positions = rows.positions.as<int32_t>();
  args.num_rows = static_cast<int32_t>(logits.dim(0));
  args.num_tokens = static_cast<int32_t>(logits.dim(1));
  args.num_sequences = static_cast<int32_t>(input.seq_slot.dim(0));
  return args;
}

}  // namespace

void CudaOps::Sample(const SampleOutput& out, const SlotState& state, const Tensor& logits, const Tensor& mask,
                     const StepInput& input, const StepRows& rows, int num_valid_tokens) {
  CheckSample(out, state, logits, mask, input, rows, num_valid_tokens);
  const OpLimits& limits = options_.limits;
  const int64_t capacity = limits.max_rows * SampleWorkStride(limits.vocab_size);
  CHECK(logits.dim(0) * SampleWorkStride(logits.dim(1)) <= capacity, "logits {}, room for {}", logits.ToString(),
        capacity);
  CHECK(limits.max_drafts <= kMaxLater, "{} drafts", limits.max_drafts);
  SampleArgs args = ArgsOf(out, state, logits, mask, input, rows);
  args.processed = workspace_.processed_logits;
  args.num_valid_tokens = num_valid_tokens;
  if (args.num_rows > 0) {
    LaunchSample(args, stream_.get());
    stream_.Launched("sample");
  }
  if (args.num_sequences > 0) {
    LaunchVerifyDrafts(args, stream_.get());
    stream_.Launched("verify drafts");
  }
}

void CudaOps::ProposeDrafts(const Tensor& proposed, const StepRows& rows, const SlotState& state, const Tensor& logits,
                            const StepInput& drafts, int index, int num_valid_tokens) {
  const int64_t num_rows = logits.dim(0);
  CHECK_SHAPE(proposed, num_rows, state.drafts.dim(1));
  CHECK(index >= 0 && index < proposed.dim(1) && num_rows <= options_.limits.max_sequences, "draft {}", index);
  if (num_rows == 0) return;
  auto* scratch = static_cast<int32_t*>(workspace_.draft_samples);
  const auto take = [&scratch](DType dtype, std::initializer_list<int64_t> dims) {
    const Tensor tensor(scratch, dtype, dims);
    scratch += tensor.num_elements();
    return tensor;
  };
  SampleOutput drawn;
  drawn.tokens = take(DType::kI32, {num_rows});
  drawn.logprobs = take(DType::kF32, {num_rows});
  drawn.top_tokens = take(DType::kI32, {num_rows, kMaxTopLogprobs});
  drawn.top_logprobs = take(DType::kF32, {num_rows, kMaxTopLogprobs});
  drawn.num_accepted = drawn.tokens;  // NOTE: not written, since nothing is verified
  CheckSample(drawn, state, logits, Tensor(), drafts, rows, num_valid_tokens);
  SampleArgs args = ArgsOf(drawn, state, logits, Tensor(), drafts, rows);
  args.processed = workspace_.processed_logits;
  args.num_valid_tokens = num_valid_tokens;
  LaunchSample(args, stream_.get());
  stream_.Launched("sample drafts");
  LaunchTakeDrafts(stream_.get(), {.drawn = drawn.tokens.as<int32_t>(),
                                   .proposed = proposed.as<int32_t>(),
                                   .drafts = state.drafts.as<int32_t>(),
                                   .tokens = rows.tokens.as<int32_t>(),
                                   .positions = rows.positions.as<int32_t>(),
                                   .slots = rows.slots.as<int32_t>(),
                                   .proposed_stride = proposed.row_stride,
                                   .drafts_stride = state.drafts.row_stride,
                                   .index = index,
                                   .num_rows = static_cast<int32_t>(num_rows)});
  stream_.Launched("take drafts");
}

}  // namespace cachalot
