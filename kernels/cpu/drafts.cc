// What drafting starts from: the main model's output one position before, kept at the borders of steps and blocks; and
// the rows that it is for.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/elementwise_kernels.h"

namespace cachalot {
namespace {

void CheckHiddens(const Tensor& borders, const SlotState& state, const StepRows& rows, int64_t num_rows) {
  CHECK_SHAPE(borders, -1, -1);
  CHECK_SHAPE(state.block_table, -1, -1);
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(rows.positions, num_rows);
}

// Which of the borders a position's output is kept in.
int64_t BlockOf(const SlotState& state, int32_t slot, int32_t position) {
  CHECK(slot < state.block_table.dim(0) && position / kBlockTokens < state.block_table.dim(1), "slot {} position {}",
        slot, position);
  return state.block_table.row<int32_t>(slot)[position / kBlockTokens];
}

}  // namespace

void CpuOps::PreviousHidden(const Tensor& out, const Tensor& hidden, const Tensor& borders, const SlotState& state,
                            const StepRows& rows) {
  const int64_t num_rows = out.dim(0);
  CheckHiddens(borders, state, rows, num_rows);
  CHECK_SHAPE(out, num_rows, borders.dim(1));
  CHECK(out.dtype == borders.dtype, "outputs change type");
  if (!hidden.empty()) {
    CHECK_SHAPE(hidden, num_rows, borders.dim(1));
    CHECK(hidden.dtype == out.dtype, "outputs change type");
  }
  const int32_t* slots = rows.slots.as<int32_t>();
  const int32_t* positions = rows.positions.as<int32_t>();
  for (int64_t t = 0; t < num_rows; ++t) {
    if (slots[t] < 0 || positions[t] == 0) {
      CopyOrClearRow(out, t, borders, -1);
    } else if (t > 0 && slots[t - 1] == slots[t]) {
      CHECK(!hidden.empty() && positions[t - 1] == positions[t] - 1, "row {}", t);
      CopyOrClearRow(out, t, hidden, t - 1);
    } else {
      CopyOrClearRow(out, t, borders, BlockOf(state, slots[t], positions[t] - 1));
    }
  }
}

void CpuOps::KeepBorders(const Tensor& borders, const Tensor& hidden, const SlotState& state, const StepRows& rows) {
  const int64_t num_rows = hidden.dim(0);
  CheckHiddens(borders, state, rows, num_rows);
  CHECK_SHAPE(hidden, num_rows, borders.dim(1));
  CHECK(hidden.dtype == borders.dtype, "outputs change type");
  const int32_t* slots = rows.slots.as<int32_t>();
  const int32_t* positions = rows.positions.as<int32_t>();
  for (int64_t t = 0; t < num_rows; ++t) {
    if (slots[t] < 0) continue;
    const int32_t length = state.length.as<int32_t>()[slots[t]], next = positions[t] + 1;
    if (next > length || (next < length && next % kBlockTokens != 0)) continue;
    CopyOrClearRow(borders, BlockOf(state, slots[t], positions[t]), hidden, t);
  }
}

void CpuOps::BeginDrafts(const StepRows& rows, const StepInput& drafts, const SlotState& state, const StepInput& input,
                         const Tensor& num_accepted) {
  const int64_t num_sequences = input.seq_slot.dim(0);
  CHECK_SHAPE(num_accepted, num_sequences);
  for (const Tensor& t : {rows.tokens, rows.positions, rows.slots, drafts.seq_slot, drafts.seq_start, drafts.row_token,
                          drafts.row_seq, drafts.row_target}) {
    CHECK_SHAPE(t, num_sequences);
  }
  CHECK_SHAPE(drafts.query_start, num_sequences + 1);
  for (int32_t s = 0; s < num_sequences; ++s) {
    const bool samples = num_accepted.as<int32_t>()[s] > 0;
    const int32_t slot = samples ? input.seq_slot.as<int32_t>()[s] : -1;
    rows.slots.as<int32_t>()[s] = drafts.seq_slot.as<int32_t>()[s] = slot;
    rows.tokens.as<int32_t>()[s] = samples ? state.last_token.as<int32_t>()[slot] : 0;
    rows.positions.as<int32_t>()[s] = samples ? state.length.as<int32_t>()[slot] : 0;
    drafts.seq_start.as<int32_t>()[s] = drafts.row_target.as<int32_t>()[s] = -1;
    drafts.query_start.as<int32_t>()[s] = drafts.row_seq.as<int32_t>()[s] = s;
    drafts.row_token.as<int32_t>()[s] = samples ? s : -1;
  }
  drafts.query_start.as<int32_t>()[num_sequences] = static_cast<int32_t>(num_sequences);
}

}  // namespace cachalot
