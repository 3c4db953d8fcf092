// The MTP layer (DeepSeek-V3 report, 2.2): what it is fed, and what it predicts. Its row at position j is made of token
// j and of the main model's output at j - 1; it stands at j in the cache, so that a block depends on its own and
// earlier tokens only, and is rotated by j - 1.
#include "engine/model/deepseek.h"

namespace cachalot {

void DeepSeek::FeedMtp(const StepArrays& step) {
  const Activations a = View(step);
  const LayerWeights& w = weights_.mtp->layer;
  ops_.PreviousHidden(a.previous, a.normed.values, cache_.borders(), step.state, step.rows);
  EmbedMtp(a, a.previous, step);
  ops_.AddRmsNorm(a.h, a.x, Tensor(), Tensor(), *w.input_layernorm, eps());
  ops_.Linear(a.q_kv_a, a.x, *w.q_kv_a_proj);
  const int64_t kv_width = config_.kv_lora_rank + config_.qk_rope_head_dim;
  const Tensor kv = a.q_kv_a.Columns(a.q_kv_a.dim(1) - kv_width, kv_width);
  ops_.LatentNormRopeWrite(cache_.mtp(), step.state, Activation(), Tensor(), kv, nullptr, *w.kv_a_layernorm, step.rows,
                           mtp_rope_, kLatentNormEps);
}

void DeepSeek::KeepBorders(const StepArrays& step) {
  ops_.KeepBorders(cache_.borders(), View(step).normed.values, step.state, step.rows);
}

Tensor DeepSeek::PreviousOutputs(const StepArrays& step) {
  const Activations a = View(step);
  ops_.PreviousHidden(a.previous, Tensor(), cache_.borders(), step.state, step.rows);
  return a.previous;
}

void DeepSeek::Draft(const StepArrays& step, const Tensor& num_accepted, const StepArrays& drafts,
                     const Tensor& proposed, int num_drafts, int num_valid_tokens) {
  KeepBorders(step);
  if (num_drafts == 0) return;
  ops_.BeginDrafts(drafts.rows, drafts.input, drafts.state, step.input, num_accepted);
  Tensor previous = PreviousOutputs(drafts);
  for (int i = 0; i < num_drafts; ++i) {
    ForwardMtp(drafts, previous);
    const Tensor logits = Head(drafts, drafts.input.row_token);
    ops_.ProposeDrafts(proposed, drafts.rows, drafts.state, logits, drafts.input, i, num_valid_tokens);
    previous = View(drafts).normed.values;
  }
}

void DeepSeek::ForwardMtp(const StepArrays& step, const Tensor& previous) {
  const Activations a = View(step);
  const MtpWeights& mtp = *weights_.mtp;
  EmbedMtp(a, previous, step);
  Layer(a, mtp.layer, Experts(config_.num_hidden_layers), {cache_.mtp(), mtp_rope_, 1}, Tensor(), step);
  ops_.AddRmsNorm(a.h, a.normed, Tensor(), a.delta, *mtp.shared_head_norm, eps());
}

// -> a.h: eh_proj of the token's embedding and `previous`, each normed.
void DeepSeek::EmbedMtp(const Activations& a, const Tensor& previous, const StepArrays& step) {
  const MtpWeights& mtp = *weights_.mtp;
  const int64_t D = config_.hidden_size;
  ops_.Embed(a.h, *weights_.embed_tokens, step.rows);
  ops_.AddRmsNorm(a.h, {a.eh.values.Columns(0, D), Tensor()}, Tensor(), Tensor(), *mtp.enorm, eps());
  ops_.AddRmsNorm(previous, {a.eh.values.Columns(D, D), Tensor()}, Tensor(), Tensor(), *mtp.hnorm, eps());
  ops_.Linear(a.h, a.eh, *mtp.eh_proj);
}

}  // namespace cachalot
