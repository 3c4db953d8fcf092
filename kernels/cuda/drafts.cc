// What drafting starts from: the main model's output one position before, kept at the borders of steps and blocks; and
// the rows that it is for.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/drafts_kernels.h"

namespace cachalot {
namespace {

BorderArgs ArgsOf(const Tensor& hidden, const Tensor& borders, const SlotState& state, const StepRows& rows) {
  const int64_t num_rows = rows.slots.dim(0);
  CHECK_SHAPE(borders, -1, -1);
  CHECK_SHAPE(state.block_table, -1, -1);
  CHECK_SHAPE(state.length, state.block_table.dim(0));
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK_SHAPE(hidden, num_rows, borders.dim(1));
  CHECK(hidden.dtype == borders.dtype, "outputs change type");
  return {rows.positions.as<int32_t>(), rows.slots.as<int32_t>(), state.block_table.as<int32_t>(),
          state.block_table.row_stride, state.length.as<int32_t>()};
}

}  // namespace

void CudaOps::PreviousHidden(const Tensor& out, const Tensor& hidden, const Tensor& borders, const SlotState& state,
                             const StepRows& rows) {
  const BorderArgs args = ArgsOf(out, borders, state, rows);
  const int64_t element = DTypeBytes(out.dtype);
  RowCopy before;
  if (!hidden.empty()) {
    CHECK_SHAPE(hidden, out.dim(0), out.dim(1));
    CHECK(hidden.dtype == out.dtype, "outputs change type");
    before = RowCopyOf(out, hidden, element);
  }
  if (out.dim(0) == 0) return;
  LaunchPreviousHidden(stream_.get(), args, before, RowCopyOf(out, borders, element), out.dim(0));
  stream_.Launched("PreviousHidden");
}

void CudaOps::KeepBorders(const Tensor& borders, const Tensor& hidden, const SlotState& state, const StepRows& rows) {
  const BorderArgs args = ArgsOf(hidden, borders, state, rows);
  if (hidden.dim(0) == 0) return;
  LaunchKeepBorders(stream_.get(), args, RowCopyOf(borders, hidden, DTypeBytes(hidden.dtype)), hidden.dim(0));
  stream_.Launched("KeepBorders");
}

void CudaOps::BeginDrafts(const StepRows& rows, const StepInput& drafts, const SlotState& state, const StepInput& input,
                          const Tensor& num_accepted) {
  const int64_t num_sequences = input.seq_slot.dim(0);
  CHECK_SHAPE(num_accepted, num_sequences);
  for (const Tensor& t : {rows.tokens, rows.positions, rows.slots, drafts.seq_slot, drafts.seq_start, drafts.row_token,
                          drafts.row_seq, drafts.row_target}) {
    CHECK_SHAPE(t, num_sequences);
  }
  CHECK_SHAPE(drafts.query_start, num_sequences + 1);
  if (num_sequences == 0) return;
  LaunchBeginDrafts(stream_.get(), {.tokens = rows.tokens.as<int32_t>(),
                                    .positions = rows.positions.as<int32_t>(),
                                    .slots = rows.slots.as<int32_t>(),
                                    .seq_slot = drafts.seq_slot.as<int32_t>(),
                                    .seq_start = drafts.seq_start.as<int32_t>(),
                                    .query_start = drafts.query_start.as<int32_t>(),
                                    .row_token = drafts.row_token.as<int32_t>(),
                                    .row_seq = drafts.row_seq.as<int32_t>(),
                                    .row_target = drafts.row_target.as<int32_t>(),
                                    .step_slot = input.seq_slot.as<int32_t>(),
                                    .num_accepted = num_accepted.as<int32_t>(),
                                    .last_token = state.last_token.as<int32_t>(),
                                    .length = state.length.as<int32_t>(),
                                    .num_sequences = static_cast<int32_t>(num_sequences)});
  stream_.Launched("BeginDrafts");
}

}  // namespace cachalot
