// Sampling kernels: what they take. Layouts of SlotParams and TokenBias are mirrored for nvcc; sampling.cc checks them.
#ifndef CACHALOT_KERNELS_CUDA_SAMPLING_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_SAMPLING_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cachalot {

inline constexpr int kTopLogits = 20;
inline constexpr int64_t kMaxSampledVocab = 1 << 18;  // ids a row; sums of masses are made for it
inline constexpr int kMaxTokenEntries = 1024;         // kMaxTokenBiases
inline constexpr int kMaxLater = 256;                 // drafts of a sequence
constexpr int64_t SampleWorkStride(int64_t num_tokens) { return (num_tokens + 3) / 4 * 4; }

// SlotParams of ops_types.h, byte for byte.
struct DrawParams {
  int32_t apply, prompt_tokens;
  float temperature;
  int32_t top_k;
  float top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  int32_t min_tokens;
  uint16_t num_banned, num_biased;
  uint32_t choice;
  uint64_t seed;
};

// TokenBias of ops_types.h.
struct BiasEntry {
  int32_t token;
  float bias;
};

// Sample's tensors; strides in elements, from row to row.
struct SampleArgs {
  // Out.
  int32_t* out_tokens;
  float* out_logprobs;
  int32_t* top_tokens;
  int64_t top_tokens_stride;
  float* top_logprobs;
  int64_t top_logprobs_stride;
  int32_t* num_accepted;
  // The slots' state.
  int32_t* length;
  int32_t* last_token;
  const uint8_t* params;
  int64_t params_stride;
  uint16_t* counts;  // null: nothing is counted
  int64_t counts_stride;
  const uint8_t* token_biases;  // null: none
  int64_t token_biases_stride;
  // In.
  const float* logits;
  int64_t logits_stride;
  const uint32_t* mask;  // null: all are allowed
  int64_t mask_stride;
  const int32_t *seq_slot, *seq_start, *query_start;
  const int32_t *row_token, *row_seq, *row_target;
  const int32_t *tokens, *positions;  // of the step's rows
  float* processed;                   // workspace [L, SampleWorkStride(W)]
  int32_t num_rows, num_tokens, num_valid_tokens, num_sequences;
};

// Once a device, before its first launch.
cudaError_t PrepareSampling();

// One block a row of logits, then one block that verifies drafts. The name of what failed to launch is left to the
// caller: errors stay in cudaGetLastError.
void LaunchSample(const SampleArgs& args, cudaStream_t stream);
void LaunchVerifyDrafts(const SampleArgs& args, cudaStream_t stream);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_SAMPLING_KERNELS_H_
