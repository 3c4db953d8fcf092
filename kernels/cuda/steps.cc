// A step's begin: block tables, token biases, parameters, and the token, position and slot of every row.
#include <cstddef>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/steps_kernels.h"

namespace cachalot {
namespace {

static_assert(sizeof(SlotParams) == kParamsBytes && offsetof(SlotParams, apply) == kParamsApply &&
              offsetof(SlotParams, prompt_tokens) == kParamsPromptTokens);

void CheckState(const SlotState& state) {
  const int64_t num_slots = state.length.dim(0);
  CHECK_SHAPE(state.length, num_slots);
  CHECK_SHAPE(state.last_token, num_slots);
  CHECK_SHAPE(state.params, num_slots, sizeof(SlotParams));
  if (!state.drafts.empty()) CHECK_SHAPE(state.drafts, num_slots, -1);
  if (!state.counts.empty()) CHECK_SHAPE(state.counts, num_slots, -1);
  if (!state.token_biases.empty()) CHECK_SHAPE(state.token_biases, num_slots, kMaxTokenBiases, sizeof(TokenBias));
}

void SetSlots(BeginStepArgs& args, const SlotState& state) {
  args.num_slots = static_cast<int32_t>(state.length.dim(0));
  args.length = state.length.as<int32_t>();
  args.last_token = state.last_token.as<int32_t>();
  args.params = state.params.as<uint8_t>();
  args.params_stride = state.params.row_stride;
  if (!state.drafts.empty()) {
    args.drafts = state.drafts.as<int32_t>();
    args.drafts_stride = state.drafts.row_stride;
    args.num_drafts = static_cast<int32_t>(state.drafts.dim(1));
  }
  if (!state.counts.empty()) {
    args.counts = state.counts.as<uint16_t>();
    args.counts_stride = state.counts.row_stride;
    args.vocab_size = state.counts.dim(1);
  }
}

void SetInput(BeginStepArgs& args, const StepInput& input) {
  args.num_sequences = input.seq_slot.dim(0);
  args.seq_slot = input.seq_slot.as<int32_t>();
  args.seq_start = input.seq_start.as<int32_t>();
  args.query_start = input.query_start.as<int32_t>();
  args.seq_params = input.seq_params.as<uint8_t>();
  args.seq_params_stride = input.seq_params.row_stride;
  args.input_tokens = input.tokens.as<int32_t>();
}

}  // namespace

void CudaOps::UpdateBlockTables(const SlotState& state, const Tensor& updates) {
  CHECK_SHAPE(updates, -1, 3);
  CHECK_SHAPE(state.block_table, -1, -1);
  if (updates.dim(0) == 0) return;
  const Tensor& table = state.block_table;
  LaunchUpdates(stream_.get(), {.updates = updates.as<int32_t>(),
                                .update_stride = updates.row_stride,
                                .num_updates = updates.dim(0),
                                .table = table.as<int32_t>(),
                                .slot_stride = table.row_stride,
                                .num_slots = static_cast<int32_t>(table.dim(0)),
                                .num_indices = static_cast<int32_t>(table.dim(1)),
                                .num_words = 1});
  stream_.Launched("UpdateBlockTables");
}

void CudaOps::UpdateTokenBiases(const SlotState& state, const Tensor& updates) {
  CHECK_SHAPE(updates, -1, 4);
  if (updates.dim(0) == 0) return;
  const Tensor& table = state.token_biases;
  CHECK_SHAPE(table, -1, kMaxTokenBiases, sizeof(TokenBias));
  CHECK(table.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(table.data) % 4 == 0, "biases are not in words");
  LaunchUpdates(stream_.get(), {.updates = updates.as<int32_t>(),
                                .update_stride = updates.row_stride,
                                .num_updates = updates.dim(0),
                                .table = static_cast<int32_t*>(table.data),
                                .slot_stride = table.row_stride / 4,
                                .num_slots = static_cast<int32_t>(table.dim(0)),
                                .num_indices = kMaxTokenBiases,
                                .num_words = sizeof(TokenBias) / 4});
  stream_.Launched("UpdateTokenBiases");
}

void CudaOps::BeginStep(const StepRows& rows, const SlotState& state, const StepInput& input) {
  const int64_t num_rows = rows.tokens.dim(0), num_sequences = input.seq_slot.dim(0);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(input.seq_start, num_sequences);
  CHECK_SHAPE(input.query_start, num_sequences + 1);
  CHECK_SHAPE(input.seq_params, num_sequences, sizeof(SlotParams));
  CHECK_SHAPE(input.tokens, num_rows);
  CheckState(state);
  BeginStepArgs args = {};
  args.tokens = rows.tokens.as<int32_t>();
  args.positions = rows.positions.as<int32_t>();
  args.slots = rows.slots.as<int32_t>();
  args.num_rows = num_rows;
  SetSlots(args, state);
  SetInput(args, input);
  step_rows_ = KeyOf(rows, input);
  planned_ = {};
  LaunchBeginStep(stream_.get(), args);
  stream_.Launched("BeginStep");
}

void CudaOps::CountTokens(const SlotState& state, const Tensor& tokens) {
  CHECK_SHAPE(tokens, -1, 3);
  if (tokens.dim(0) == 0 || state.counts.empty()) return;
  LaunchCountTokens(stream_.get(), {.tokens = tokens.as<int32_t>(),
                                    .token_stride = tokens.row_stride,
                                    .num_tokens = tokens.dim(0),
                                    .counts = state.counts.as<uint16_t>(),
                                    .counts_stride = state.counts.row_stride,
                                    .vocab_size = state.counts.dim(1),
                                    .num_slots = static_cast<int32_t>(state.counts.dim(0))});
  stream_.Launched("CountTokens");
}

}  // namespace cachalot
