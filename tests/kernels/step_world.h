// Slots and steps for the tests of BeginStep and Sample.
#ifndef CACHALOT_TESTS_KERNELS_STEP_WORLD_H_
#define CACHALOT_TESTS_KERNELS_STEP_WORLD_H_

#include <bit>
#include <cstring>
#include <vector>

#include "tests/kernels/testing.h"

namespace cachalot::testing {

// State of `num_slots` slots, zeroed as Device::Allocate gives it.
struct StepWorld {
  StepWorld(int64_t num_slots, int64_t num_drafts, int64_t vocab, bool has_counts) {
    block_table = Zeroed(DType::kI32, {num_slots, 4});
    length = Zeroed(DType::kI32, {num_slots});
    last_token = Zeroed(DType::kI32, {num_slots});
    params = Zeroed(DType::kU8, {num_slots, sizeof(SlotParams)});
    if (num_drafts > 0) drafts = Zeroed(DType::kI32, {num_slots, num_drafts});
    if (has_counts) counts = Zeroed(DType::kU16, {num_slots, vocab});
    token_biases = Zeroed(DType::kU8, {num_slots, kMaxTokenBiases, sizeof(TokenBias)});
    state = {block_table, length, last_token, drafts, params, counts, token_biases};
  }
  static Owned Zeroed(DType dtype, std::initializer_list<int64_t> dims) {
    Owned owned(dtype, dims);
    std::memset(owned->data, 0, owned->num_bytes());
    return owned;
  }
  int32_t Length(int slot) const { return length.data<int32_t>()[slot]; }
  int32_t Last(int slot) const { return last_token.data<int32_t>()[slot]; }
  uint16_t Count(int slot, int token) const { return counts->row<uint16_t>(slot)[token]; }
  TokenBias Entry(int slot, int index) const {
    TokenBias entry;
    std::memcpy(&entry, token_biases->row<uint8_t>(slot) + index * sizeof(entry), sizeof(entry));
    return entry;
  }

  Owned block_table, length, last_token, drafts, params, counts, token_biases;
  SlotState state;
};

// One sequence of a step. Rows of a chunk bring tokens; decode rows only their number.
struct StepSequence {
  int32_t slot = 0;
  int32_t start = -1;  // -1: decode
  std::vector<int32_t> tokens;
  int32_t num_rows = 0;  // of a decode
  SlotParams params;
  bool samples = true;  // the last row of a chunk, all rows of a decode
};

struct Step {
  Step(const std::vector<StepSequence>& sequences, int64_t padding_rows = 0) {
    const int64_t num_sequences = static_cast<int64_t>(sequences.size());
    std::vector<int32_t> slots, starts, begins = {0}, tokens, rows, seqs, targets;
    seq_params = Owned(DType::kU8, {num_sequences, sizeof(SlotParams)});
    for (int64_t s = 0; s < num_sequences; ++s) {
      const StepSequence& sequence = sequences[s];
      const bool is_decode = sequence.start < 0;
      const int32_t count = is_decode ? sequence.num_rows : static_cast<int32_t>(sequence.tokens.size());
      slots.push_back(sequence.slot);
      starts.push_back(sequence.start);
      for (int32_t i = 0; i < count; ++i) {
        tokens.push_back(is_decode ? -7 : sequence.tokens[i]);
        if (!sequence.samples || (!is_decode && i + 1 < count)) continue;
        rows.push_back(begins.back() + i);
        seqs.push_back(static_cast<int32_t>(s));
        targets.push_back(-1);
      }
      begins.push_back(begins.back() + count);
      std::memcpy(seq_params->row<uint8_t>(s), &sequence.params, sizeof(SlotParams));
    }
    tokens.resize(tokens.size() + padding_rows, -9);
    const int64_t num_rows = static_cast<int64_t>(tokens.size());
    seq_slot = Owned(DType::kI32, {num_sequences}).Set(slots);
    seq_start = Owned(DType::kI32, {num_sequences}).Set(starts);
    query_start = Owned(DType::kI32, {num_sequences + 1}).Set(begins);
    in_tokens = Owned(DType::kI32, {num_rows}).Set(tokens);
    row_tokens = Owned(DType::kI32, {num_rows});
    positions = Owned(DType::kI32, {num_rows});
    row_slots = Owned(DType::kI32, {num_rows});
    SetLogitRows(rows, seqs, targets);
  }
  void SetLogitRows(const std::vector<int32_t>& rows, const std::vector<int32_t>& seqs,
                    const std::vector<int32_t>& targets) {
    const int64_t n = static_cast<int64_t>(rows.size());
    row_token = Owned(DType::kI32, {n}).Set(rows);
    row_seq = Owned(DType::kI32, {n}).Set(seqs);
    row_target = Owned(DType::kI32, {n}).Set(targets);
    input = {seq_slot, seq_start, query_start, seq_params, in_tokens, row_token, row_seq, row_target};
    step_rows = {row_tokens, positions, row_slots};
    out_tokens = Owned(DType::kI32, {n});
    logprobs = Owned(DType::kF32, {n});
    top_tokens = Owned(DType::kI32, {n, kMaxTopLogprobs});
    top_logprobs = Owned(DType::kF32, {n, kMaxTopLogprobs});
    num_accepted = Owned(DType::kI32, {seq_slot->dim(0)});
    out = {out_tokens, logprobs, top_tokens, top_logprobs, num_accepted};
  }
  static std::vector<int32_t> Ints(const Tensor& t) {
    return std::vector<int32_t>(t.as<int32_t>(), t.as<int32_t>() + t.num_elements());
  }

  Owned seq_slot, seq_start, query_start, seq_params, in_tokens, row_token, row_seq, row_target;
  Owned row_tokens, positions, row_slots;
  Owned out_tokens, logprobs, top_tokens, top_logprobs, num_accepted;
  StepInput input;
  StepRows step_rows;
  SampleOutput out;
};

// A slot's banned and biased tokens as UpdateTokenBiases takes them, with a row of padding.
inline Owned BiasUpdates(int32_t slot, const std::vector<TokenBias>& entries) {
  std::vector<int32_t> updates;
  for (size_t i = 0; i < entries.size(); ++i) {
    const int32_t row[] = {slot, static_cast<int32_t>(i), entries[i].token, std::bit_cast<int32_t>(entries[i].bias)};
    updates.insert(updates.end(), std::begin(row), std::end(row));
  }
  updates.insert(updates.end(), {-1, 5, 5, 5});
  return Owned(DType::kI32, {static_cast<int64_t>(entries.size()) + 1, 4}).Set(updates);
}

// Parameters of a sequence that enters its slot.
inline SlotParams Entering(int32_t prompt_tokens, float temperature = 0) {
  SlotParams params;
  params.apply = 1;
  params.prompt_tokens = prompt_tokens;
  params.temperature = temperature;
  return params;
}

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_STEP_WORLD_H_
