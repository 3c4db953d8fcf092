// Launches of a step's begin.
#ifndef CACHALOT_KERNELS_CUDA_STEPS_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_STEPS_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cachalot {

// Entries (slot, index, words..) written in order: the last of equal (slot, index) stays.
struct UpdateArgs {
  const int32_t* updates;  // [num_updates, 2 + num_words], slot -1: padding
  int64_t update_stride;
  int64_t num_updates;
  int32_t* table;  // [num_slots, num_indices, num_words]
  int64_t slot_stride;
  int32_t num_slots, num_indices, num_words;
};
void LaunchUpdates(cudaStream_t stream, const UpdateArgs& args);

// SlotParams as bytes.
inline constexpr int kParamsBytes = 56;
inline constexpr int kParamsApply = 0;         // offset of an i32
inline constexpr int kParamsPromptTokens = 4;  // likewise

struct BeginStepArgs {
  // Rows, out.
  int32_t* tokens;
  int32_t* positions;
  int32_t* slots;
  int64_t num_rows;
  // Slots.
  int32_t num_slots;
  int32_t* length;
  const int32_t* last_token;
  const int32_t* drafts;  // null: none
  int64_t drafts_stride;
  int32_t num_drafts;
  uint8_t* params;
  int64_t params_stride;
  uint16_t* counts;  // null: none
  int64_t counts_stride, vocab_size;
  // The step.
  int64_t num_sequences;
  const int32_t* seq_slot;
  const int32_t* seq_start;
  const int32_t* query_start;
  const uint8_t* seq_params;
  int64_t seq_params_stride;
  const int32_t* input_tokens;
};
void LaunchBeginStep(cudaStream_t stream, const BeginStepArgs& args);

// Tokens (slot, token, is_generated) counted; slot -1: padding.
struct CountTokensArgs {
  const int32_t* tokens;  // [num_tokens, 3]
  int64_t token_stride, num_tokens;
  uint16_t* counts;
  int64_t counts_stride, vocab_size;
  int32_t num_slots;
};
void LaunchCountTokens(cudaStream_t stream, const CountTokensArgs& args);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_STEPS_KERNELS_H_
