// A step's begin: block tables, token biases, parameters, and the token, position and slot of every row.
#include <bit>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/penalty_counts.h"

namespace cachalot {
namespace {

void CheckState(const SlotState& state) {
  const int64_t num_slots = state.length.dim(0);
  CHECK_SHAPE(state.length, num_slots);
  CHECK_SHAPE(state.last_token, num_slots);
  CHECK_SHAPE(state.params, num_slots, sizeof(SlotParams));
  if (!state.drafts.empty()) CHECK_SHAPE(state.drafts, num_slots, -1);
  if (!state.counts.empty()) CHECK_SHAPE(state.counts, num_slots, -1);
  if (!state.token_biases.empty()) CHECK_SHAPE(state.token_biases, num_slots, kMaxTokenBiases, sizeof(TokenBias));
}

// The sequence takes its slot: new parameters, nothing counted.
void EnterSlot(const SlotState& state, int32_t slot, const uint8_t* params) {
  std::memcpy(state.params.row<uint8_t>(slot), params, sizeof(SlotParams));
  state.length.as<int32_t>()[slot] = 0;
  if (!state.counts.empty()) std::memset(state.counts.row<uint16_t>(slot), 0, state.counts.dim(1) * sizeof(uint16_t));
}

}  // namespace

void CpuOps::UpdateBlockTables(const SlotState& state, const Tensor& updates) {
  CHECK_SHAPE(updates, -1, 3);
  for (int64_t i = 0; i < updates.dim(0); ++i) {
    const int32_t* update = updates.row<int32_t>(i);
    const int32_t slot = update[0], index = update[1], block = update[2];
    if (slot < 0) continue;
    CHECK(slot < state.block_table.dim(0) && index >= 0 && index < state.block_table.dim(1), "slot {} index {}", slot,
          index);
    state.block_table.row<int32_t>(slot)[index] = block;
  }
}

void CpuOps::UpdateTokenBiases(const SlotState& state, const Tensor& updates) {
  CHECK_SHAPE(updates, -1, 4);
  for (int64_t i = 0; i < updates.dim(0); ++i) {
    const int32_t* update = updates.row<int32_t>(i);
    const int32_t slot = update[0], index = update[1];
    if (slot < 0) continue;
    CHECK(slot < state.token_biases.dim(0) && index >= 0 && index < kMaxTokenBiases, "slot {} index {}", slot, index);
    const TokenBias entry = {update[2], std::bit_cast<float>(update[3])};
    std::memcpy(state.token_biases.row<uint8_t>(slot) + index * sizeof(entry), &entry, sizeof(entry));
  }
}

void CpuOps::BeginStep(const StepRows& rows, const SlotState& state, const StepInput& input) {
  const int64_t num_rows = rows.tokens.dim(0), num_sequences = input.seq_slot.dim(0);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(input.seq_start, num_sequences);
  CHECK_SHAPE(input.query_start, num_sequences + 1);
  CHECK_SHAPE(input.seq_params, num_sequences, sizeof(SlotParams));
  CHECK_SHAPE(input.tokens, num_rows);
  CheckState(state);
  int32_t* tokens = rows.tokens.as<int32_t>();
  int32_t* positions = rows.positions.as<int32_t>();
  int32_t* slots = rows.slots.as<int32_t>();
  const int32_t* query_start = input.query_start.as<int32_t>();
  std::fill_n(tokens, num_rows, 0);
  std::fill_n(positions, num_rows, 0);
  std::fill_n(slots, num_rows, -1);

  for (int64_t s = 0; s < num_sequences; ++s) {
    const int32_t slot = input.seq_slot.as<int32_t>()[s];
    if (slot < 0) continue;
    CHECK(slot < state.length.dim(0) && query_start[s + 1] <= num_rows, "slot {}, rows to {}", slot,
          query_start[s + 1]);
    SlotParams params;
    std::memcpy(&params, input.seq_params.row<uint8_t>(s), sizeof(params));
    if (params.apply != 0) EnterSlot(state, slot, input.seq_params.row<uint8_t>(s));
    std::memcpy(&params, state.params.row<uint8_t>(slot), sizeof(params));

    // Decode rows come from the slot, rows of a chunk from the host.
    int32_t* length = state.length.as<int32_t>() + slot;
    const int32_t start = input.seq_start.as<int32_t>()[s];
    const bool is_decode = start < 0;
    const int32_t first_position = is_decode ? *length : start;
    const int32_t first_row = query_start[s], count = query_start[s + 1] - first_row;
    CHECK(!is_decode || count <= 1 + (state.drafts.empty() ? 0 : state.drafts.dim(1)), "{} decode rows", count);
    for (int32_t i = 0; i < count; ++i) {
      const int32_t row = first_row + i, position = first_position + i;
      if (!is_decode) {
        tokens[row] = input.tokens.as<int32_t>()[row];
      } else {
        tokens[row] = i == 0 ? state.last_token.as<int32_t>()[slot] : state.drafts.row<int32_t>(slot)[i - 1];
      }
      positions[row] = position;
      slots[row] = slot;
      if (!state.counts.empty()) {
        CountToken(state.counts.row<uint16_t>(slot) + tokens[row], position >= params.prompt_tokens);
      }
    }
    *length = first_position + count;
  }
}

void CpuOps::CountTokens(const SlotState& state, const Tensor& tokens) {
  CHECK_SHAPE(tokens, -1, 3);
  if (state.counts.empty()) return;
  for (int64_t i = 0; i < tokens.dim(0); ++i) {
    const int32_t* entry = tokens.row<int32_t>(i);
    const int32_t slot = entry[0], token = entry[1];
    if (slot < 0) continue;
    CHECK(slot < state.counts.dim(0) && token >= 0 && token < state.counts.dim(1), "slot {} token {}", slot, token);
    uint16_t* count = state.counts.row<uint16_t>(slot) + token;
    CountToken(count, entry[2] != 0);
  }
}

}  // namespace cachalot
