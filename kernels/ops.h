// Ops: every verb of the model, on one page. Outputs first, then inputs, then scalars.
//
// Dimensions  T tokens (rows of a step)   S sequences of a step   D hidden      H heads        Q q_lora_rank
//             C kv_lora_rank              R qk_rope_head_dim      N qk_nope     V v_head_dim   E routed experts
//             K experts per token         F expert width          G local expert slots        M dispatched rows
//             B KV blocks                 P = 64 tokens a block   W vocabulary  L logits rows  U slots  X drafts (k)
//
// "Report" is the DeepSeek-V3 technical report (arXiv 2412.19437).
//
// Contract. A verb checks its shapes, queues its work on the device's stream and returns; it never allocates, reads
// back, or launches depending on data: what varies is in device memory, workspace was made for the maxima of
// OpLimits. A row whose slot is -1 is padding: it writes nothing outside its own row and dispatches nothing. Rows do
// not influence each other except through the cache, and a row's result does not depend on which rows it shares a
// step with (CPU: bit for bit). T = 0 is legal everywhere.
#ifndef CACHALOT_KERNELS_OPS_H_
#define CACHALOT_KERNELS_OPS_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/ops_types.h"

namespace cachalot {

class Ops {
 public:
  virtual ~Ops() = default;

  // ---- Weights. Sources are host memory that outlives the Ops (the mapped checkpoint); stored types are kept. On the
  // GPU a source without data stands for random values: norms near 1, weights of deviation 1 / sqrt(cols).
  virtual std::unique_ptr<Weight> MakeVector(const Tensor& source) = 0;                        // norms, bias: [n]
  virtual std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& row_stacked) = 0;  // [sum of rows, cols]
  virtual std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim,
                                           int v_dim) = 0;  // kv_b_proj [H*(N+V), C] -> W_UK, W_UV of every head
  virtual std::unique_ptr<Weight> MakeExperts(
      const std::vector<std::vector<WeightPart>>& row_stacked_per_slot) = 0;  // G of [rows, cols]
  // After the last Make and before the first step: waits until every weight is where it is read from. A backend copies
  // in the background until then. ResourceExhausted when a weight or workspace found no room; Internal with a device's
  // fault.
  virtual absl::Status FinishWeights() = 0;
  // What the Makes that `make` calls would take of the device's memory: then they allocate and read nothing, and what
  // they return is of no use. 0 where weights are read where they are.
  virtual int64_t MeasureWeights(const std::function<void()>& /*make*/) { return 0; }
  // Of what is to be copied, what has been read so far. Any thread.
  virtual int64_t weight_bytes_copied() const { return 0; }

  // ---- A step's begin. Block table entries first, in a submission of their own: (slot, index, block), slot -1
  // padding.
  virtual void UpdateBlockTables(const SlotState& state, const Tensor& updates) = 0;  // [n,3] i32
  // Likewise the tokens that sequences which enter their slots ban or bias: (slot, index, token, bits of the f32 bias).
  virtual void UpdateTokenBiases(const SlotState& state, const Tensor& updates) = 0;  // [n,4] i32
  // Takes new parameters, then writes every row's token, position and slot, counts the tokens that enter the cache
  // (penalties), and moves each slot's `length` past them.
  virtual void BeginStep(const StepRows& rows, const SlotState& state, const StepInput& input) = 0;

  // After BeginStep and before Sample: tokens that the cache had already are counted as if they had been fed: (slot,
  // token, 0 if it is of the prompt, else 1), slot -1 padding.
  virtual void CountTokens(const SlotState& state, const Tensor& tokens) = 0;  // [n,3] i32

  // ---- The forward pass.
  virtual void Embed(const Tensor& h, const Weight& embed_tokens, const StepRows& rows) = 0;  // h [T,D] residual

  // h += delta (when given); x = h * rsqrt(mean(h^2) + eps) * weight. `plain` (when given) gets x unquantised.
  virtual void AddRmsNorm(const Tensor& h,       // [T,D] residual, in and out
                          const Activation& x,   // [T,D]
                          const Tensor& plain,   // [T,D] f32 | bf16, or empty
                          const Tensor& delta,   // [T,D], or empty
                          const Weight& weight,  // [D]
                          float eps) = 0;

  // y = x * w^T, fp32 accumulation; FP8 by blocks of 128 (report 3.3.2).
  virtual void Linear(const Tensor& y, const Activation& x, const Weight& w) = 0;  // [T,out] <- [T,in], w [out,in]

  // After the fused down-projections (2.1.1 of the report, eq. 1-5): the latent c = norm(kv[:C]) and k_pe =
  // rope(kv[C:]) go to the cache at every row's position; q_latent = norm(q_a), when the model has a q_lora_rank.
  virtual void LatentNormRopeWrite(const KvCache& cache, const SlotState& state,
                                   const Activation& q_latent,    // [T,Q], or empty values
                                   const Tensor& q_a,             // [T,Q], or empty
                                   const Tensor& kv,              // [T,C+R]
                                   const Weight* q_a_layernorm,   // [Q], or null
                                   const Weight& kv_a_layernorm,  // [C]
                                   const StepRows& rows, const RopeTable& rope, float eps) = 0;

  // Multi-head latent attention over the paged cache, causal by position, keys of this step included (report eq. 6-11).
  // Ropes q's last R of every head itself; whether W_UK / W_UV are absorbed is the backend's choice. Keys at positions
  // below `first_key` do not exist, nor do rows.
  virtual void MlaAttention(const Activation& out,  // [T,H*V]
                            const Tensor& q,        // [T,H*(N+R)], not yet rotated
                            const Weight& kv_up,    // MakeKvUp
                            const KvCache& cache,
                            const SlotState& state,  // block tables
                            const StepInput& input, const StepRows& rows, const RopeTable& rope, float softmax_scale,
                            int first_key) = 0;

  virtual void SiluMul(const Activation& out, const Tensor& gate_up) = 0;  // [T,F] <- silu([T,0:F]) * [T,F:2F]

  // What `work` calls may run beside what is called after, until JoinBeside, and shares no outputs with it. One at a
  // time.
  virtual void Beside(absl::FunctionRef<void()> work) { work(); }
  virtual void JoinBeside() {}

  // fp32 logits = x * gate^T, then group-limited top-k (report 2.1.2, eq. 12-16). Logical experts become
  // physical slots by the table, and are counted there; padding rows get -1.
  virtual void Router(const Tensor& topk_slots,       // [T,K] i32
                      const Tensor& topk_weights,     // [T,K] f32
                      const Tensor& x,                // [T,D] unquantised
                      const Weight& gate,             // [E,D]
                      const Weight* correction_bias,  // [E], or null
                      const ExpertTable& experts, const StepRows& rows, const RouterOptions& options) = 0;

  // The experts' products over rows grouped by local slot; `offsets` [G+1] lives on the device.
  virtual void GroupedLinear(const Tensor& y, const Activation& x, const Weight& experts, const Tensor& offsets) = 0;
  virtual void GroupedSiluMul(const Activation& out, const Tensor& gate_up,
                              const Tensor& offsets) = 0;  // [M,F] <- [M,2F]

  // x of the rows that logits are wanted of: out[l] = x[row_token[l]]; padding (-1) gives zeros.
  virtual void GatherRows(const Activation& out, const Activation& x, const Tensor& row_token) = 0;  // [L,D] <- [T,D]

  // ---- Drafting with an MTP layer (report 2.2), whose row at position j is made of token j and of the main model's
  // output at position j - 1. `borders` [B,D] keeps for each block the output at the last of its positions that counts.

  // The output one position before each row: in `hidden`, where the row before is of the same sequence, else in
  // `borders`; zeros at position 0 and in padding. `hidden` may be empty where no two rows are of one sequence.
  virtual void PreviousHidden(const Tensor& out,     // [T,D]
                              const Tensor& hidden,  // [T,D]
                              const Tensor& borders, const SlotState& state, const StepRows& rows) = 0;
  // After Sample: `borders` of every block that rows are in which count, those below their slot's `length`.
  virtual void KeepBorders(const Tensor& borders, const Tensor& hidden, const SlotState& state,
                           const StepRows& rows) = 0;
  // After Sample: the rows of a drafting pass, one for each sequence of the step. Where it has sampled, the slot's last
  // token at position `length`; else padding. `drafts` says of the rows what verbs need: all but parameters and tokens.
  virtual void BeginDrafts(const StepRows& rows, const StepInput& drafts, const SlotState& state,
                           const StepInput& input,
                           const Tensor& num_accepted) = 0;  // [S] i32
  // Draft `index` of every row is what Sample would draw from these logits, the last token not counted. It is the row's
  // token in the next pass, one position on; `proposed` [S,X] gets it too.
  virtual void ProposeDrafts(const Tensor& proposed, const StepRows& rows, const SlotState& state,
                             const Tensor& logits,  // [S,W] f32
                             const StepInput& drafts, int index, int num_valid_tokens) = 0;

  // ---- A step's end: sampled tokens, drafts verified, log-probabilities; each slot's state moves on.
  // Biases, penalties (repetition, then frequency and presence), mask and bans, temperature, top_k, top_p of what that
  // leaves, min_p; then the arg-max of logit + noise, ties to the lower id; temperature 0 takes the arg-max before
  // top_k. Bans hold while the drawn token's position is below prompt_tokens + min_tokens; where they leave no token
  // that the mask allows they do not hold, and where the mask allows none the token is 0. The noise of a token is
  // -log(-log(u)), u = ((r >> 9) + 0.5) / 2^23, where r is word id % 4 of Philox4x32-10 with counter {id / 4, position,
  // choice, 0} and key {seed's low half, high half}; position is that of the token being drawn.
  virtual void Sample(const SampleOutput& out, const SlotState& state,
                      const Tensor& logits,  // [L,W] f32
                      const Tensor& mask,    // [L,ceil(W/32)] u32, bit set = allowed; or empty
                      const StepInput& input, const StepRows& rows, int num_valid_tokens) = 0;  // ids below it exist
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_OPS_H_
