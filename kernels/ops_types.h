// The plain types that the verbs of ops.h take. Dimension letters: see ops.h.
#ifndef CACHALOT_KERNELS_OPS_TYPES_H_
#define CACHALOT_KERNELS_OPS_TYPES_H_

#include <cstdint>
#include <string>

#include "kernels/long_chunks.h"
#include "kernels/tensor.h"

namespace cachalot {

inline constexpr int kBlockTokens = 64;  // P: tokens a KV block
inline constexpr int kQuantGroup = 128;  // FP8 scale group along a row; weights are scaled by 128x128
inline constexpr int kMaxTopLogprobs = 20;
// Lower temperatures are greedy, and higher penalties forbid: beyond these, logits would overflow.
inline constexpr float kLeastTemperature = 1e-5f, kMostRepetitionPenalty = 1e10f;
inline constexpr int kMaxTokenBiases = 1024;  // token ids that a sequence bans or biases

// The maxima a backend makes its workspace for, and the model's dimensions.
struct OpLimits {
  int max_tokens = 0;     // T
  int max_sequences = 0;  // S, also U: the number of slots
  int max_rows = 0;       // L, of one call
  int max_context = 0;    // tokens of one sequence
  int max_drafts = 0;     // X
  int num_ranks = 1;      // that the experts are spread over
  // M where ranks run a step with a T of their own each: what all may send to this one. 0: T is the same everywhere,
  // and M is what a step of that T may send.
  int max_expert_rows = 0;
  int hidden_size = 0, num_heads = 0, q_lora_rank = 0, kv_lora_rank = 0, qk_rope_head_dim = 0, qk_nope_head_dim = 0;
  int v_head_dim = 0, num_experts = 0, num_experts_per_tok = 0, num_local_experts = 0, max_ffn_width = 0;
  int vocab_size = 0;
};

// One checkpoint tensor: w = weight * scale of its 128x128 block (scale is the multiplier, despite `_scale_inv`).
struct WeightPart {
  Tensor weight;  // [rows, cols] f32 | bf16 | f16 | f8e4m3
  Tensor scale;   // [ceil(rows/128), ceil(cols/128)] f32, for f8e4m3 only
};

// A prepared weight: opaque, owned by the model, in whatever form the backend wants.
class Weight {
 public:
  Weight(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {}
  virtual ~Weight() = default;
  int64_t rows() const { return rows_; }  // out features (of one expert); 1 for a vector
  int64_t cols() const { return cols_; }  // in features; length of a vector

 private:
  int64_t rows_, cols_;
};

// cos and sin of position * inv_freq (YaRN applied), made once on the host; interleaved pairs (x[2i], x[2i+1]) rotate.
struct RopeTable {
  Tensor cos_sin;  // [positions, R] f32: R/2 cosines, then R/2 sines
};

// One layer's latent cache. A token's entry is [c (normed) C | k_pe (rotated) R]: f32 and bf16 store C+R values; fp8
// stores C e4m3 values, C/128 f32 scales (ceil, by the fp32 rule), then R bf16 values: 656 bytes at V3's dimensions.
enum class KvDType : uint8_t { kF32, kBF16, kFP8 };
struct KvCache {
  Tensor blocks;  // [B, P, token_bytes] u8
  KvDType dtype = KvDType::kF32;
};
constexpr int64_t KvTokenBytes(KvDType dtype, int64_t kv_lora_rank, int64_t rope_dim) {
  if (dtype == KvDType::kF32) return (kv_lora_rank + rope_dim) * 4;
  if (dtype == KvDType::kBF16) return (kv_lora_rank + rope_dim) * 2;
  return kv_lora_rank + (kv_lora_rank + kQuantGroup - 1) / kQuantGroup * 4 + rope_dim * 2;
}

// How experts are chosen: report 2.1.2, eq. 12-16; V2 scores by softmax and groups by their maximum (arXiv 2405.04434).
struct RouterOptions {
  enum class Scoring : uint8_t { kSigmoid, kSoftmax };
  enum class GroupScore : uint8_t { kTop2Sum, kMax };
  Scoring scoring = Scoring::kSigmoid;
  GroupScore group_score = GroupScore::kTop2Sum;
  int n_group = 1;  // 1: no group selection
  int topk_group = 1;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1.0f;
};

// Where a layer's experts are. Copies of one hold the same weights: whichever a row takes, its result is the same.
struct ExpertTable {
  Tensor slots;   // [E, 1+C] i32: the number of copies that rows may take, then their physical slots: row t of a step
                  // takes copy t % number
  Tensor counts;  // [E] i64: rows that chose it are added; or empty
};

// What is added to a token's logit; of a banned token only the id counts. Plain bytes, like SlotParams.
struct TokenBias {
  int32_t token = 0;
  float bias = 0.0f;
};

// How a sequence's tokens are drawn. Plain bytes: uploaded as they are, one per sequence of a step.
struct SlotParams {
  int32_t apply = 0;          // 1: the sequence enters its slot in this step: take these, forget the slot's past
  int32_t prompt_tokens = 0;  // positions below are prompt, for the penalties
  float temperature = 1.0f;   // 0: greedy; otherwise kLeastTemperature or more
  int32_t top_k = 0;          // 0: off
  float top_p = 1.0f;         // 1: off
  float min_p = 0.0f;         // 0: off
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;  // 1 / kMostRepetitionPenalty to kMostRepetitionPenalty
  int32_t min_tokens = 0;           // the slot's banned tokens are not drawn while fewer have been generated
  // Entries of the slot's token_biases: first those that are banned, then those that are biased. Ids differ within
  // either; one that is in both is banned.
  uint16_t num_banned = 0, num_biased = 0;
  uint32_t choice = 0;  // keys the noise apart between the n answers of one request
  uint64_t seed = 0;
};

// Per-slot state that lives on the device, so that a step can follow another before the host has seen its result.
struct SlotState {
  Tensor block_table;   // [U, ceil(max_context/P)] i32
  Tensor length;        // [U] i32 tokens whose latents are in the cache
  Tensor last_token;    // [U] i32 the token sampled last: the next decode row's input
  Tensor drafts;        // [U, X] i32 tokens proposed to follow it; empty when X = 0
  Tensor params;        // [U, sizeof(SlotParams)] u8
  Tensor counts;        // [U, W] u16: bit 15 = occurs in the prompt, bits 0..14 = times generated; empty until a
                        // penalty is used by any configuration of the server
  Tensor token_biases;  // [U, kMaxTokenBiases, sizeof(TokenBias)] u8; empty where no sequence bans or biases
};

// What the host uploads for a step, one packed buffer. Sequence s has rows query_start[s] .. query_start[s+1]; rows
// from query_start[S] on are padding.
struct StepInput {
  Tensor seq_slot;     // [S] i32; -1: padding
  Tensor seq_start;    // [S] i32 position of the first row of a prefill chunk; -1: a decode row (1 + X rows), whose
                       // tokens and positions come from the slot: last_token, drafts; from position `length` on
  Tensor query_start;  // [S+1] i32
  Tensor seq_params;   // [S, sizeof(SlotParams)] u8
  Tensor tokens;       // [T] i32 of prefill rows; ignored for decode rows
  Tensor row_token;    // [L] i32 which of the T rows; -1: padding. Rows of one sequence that sample are consecutive
  Tensor row_seq;      // [L] i32 which of the S sequences
  Tensor row_target;   // [L] i32 score this token (prompt log-probabilities); -1: sample
  // Not uploaded. A backend may launch other kernels for them, or take no notice.
  LongChunks long_chunks = {};
};

// Every row of a step, written by BeginStep.
struct StepRows {
  Tensor tokens;     // [T] i32
  Tensor positions;  // [T] i32
  Tensor slots;      // [T] i32; -1: padding
};

// What a step returns. A sampling sequence with X drafts has 1 + X rows: row i is sampled as if drafts 0..i-1 were
// right, and counts while they are.
struct SampleOutput {
  Tensor tokens;        // [L] i32 sampled, or the target that was scored
  Tensor logprobs;      // [L] f32 of that token, from the raw logits
  Tensor top_tokens;    // [L, 20] i32 by falling logit, ties by id
  Tensor top_logprobs;  // [L, 20] f32
  Tensor num_accepted;  // [S] i32 sampled tokens that count: 1 + accepted drafts; 0 where none was sampled
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_OPS_TYPES_H_
