// Attention kernels: queries into latent space, one group of keys, groups combined.
#ifndef CACHALOT_KERNELS_CPU_ATTENTION_KERNELS_H_
#define CACHALOT_KERNELS_CPU_ATTENTION_KERNELS_H_

#include "kernels/cpu/arena.h"
#include "kernels/cpu/weights.h"
#include "kernels/ops_types.h"

namespace cachalot {

// Keys are attended in groups of pages at absolute positions: a row's arithmetic depends on its own position only.
inline constexpr int kGroupPages = 4;
inline constexpr int kGroupTokens = kGroupPages * kBlockTokens;
inline constexpr int kTileQueries = 64;  // (token, head) pairs that share a reading of the keys

// Distances between rows, in values: whole vectors at every target. NOTE: latents have 16 values more, so that rows do
// not share cache sets.
constexpr int64_t PaddedQuery(int64_t kv_lora_rank, int64_t rope_dim) {
  return (kv_lora_rank + rope_dim + 15) / 16 * 16;
}
constexpr int64_t PaddedLatent(int64_t kv_lora_rank) { return (kv_lora_rank + 15) / 16 * 16 + 16; }

size_t AbsorbArenaBytes();
size_t AttendArenaBytes(int64_t kv_lora_rank, int64_t rope_dim);

// out[t, c_begin .. +c_count) <- factor * q[t, 0..N) * W_UK of one head, for all rows t; c_begin a multiple of 128,
// c_count at most 128. Written up to the next multiple of the vector size.
void AbsorbHead(const std::vector<RowBlock>& w_uk, const Tensor& q,  // [T,N] f32
                int64_t c_begin, int64_t c_count, float factor, float* out, int64_t out_stride, Arena arena);

// Attention of up to kTileQueries queries of one sequence over the keys of one group that each may see.
struct GroupAttention {
  const float* queries = nullptr;    // [num_queries][PaddedQuery], scaled, zero-padded
  const int32_t* visible = nullptr;  // [num_queries] keys of this group, a prefix of it; 0 is legal
  int num_hidden = 0;                // keys at its begin that no query sees; less than any `visible`
  int num_queries = 0;
  const uint8_t* pages[kGroupPages] = {};  // null where no query sees any
  KvDType dtype = KvDType::kF32;
  int64_t kv_lora_rank = 0, rope_dim = 0;
};
// Softmax statistics and the sums of values they weigh.
struct PartialAttention {
  float* max = nullptr;      // [num_queries]
  float* sum = nullptr;      // [num_queries] of exp(score - max)
  float* latents = nullptr;  // [num_queries][PaddedLatent] sums of exp(score - max) * c
};
void AttendGroup(const GroupAttention& group, const PartialAttention& out, Arena arena);

// total <- total and part together, by their maxima; queries that see nothing of the group stay as they are.
void MergeAttention(const PartialAttention& total, const PartialAttention& part, const int32_t* visible,
                    int num_queries, int64_t kv_lora_rank);

// latents <- latents / sum.
void FinishAttention(const PartialAttention& total, int num_queries, int64_t kv_lora_rank);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_ATTENTION_KERNELS_H_
