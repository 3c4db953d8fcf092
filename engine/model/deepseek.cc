// DeepSeek: the model on one page (DeepSeek-V3 report, 2.1). Dimension letters: kernels/ops.h.
#include "engine/model/deepseek.h"

#include <algorithm>

namespace cachalot {

void DeepSeek::Forward(const StepArrays& step) {
  const Activations a = View(step);
  ops_.Embed(a.h, *weights_.embed_tokens, step.rows);  // [T,D]
  Tensor delta;                                        // what the last sublayer adds to h: the next norm does it
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    Layer(a, weights_.layers[layer], Experts(layer), {cache_.layer(layer), rope_, 0}, delta, step);
    delta = a.delta;
  }
  ops_.AddRmsNorm(a.h, a.normed, Tensor(), delta, *weights_.norm, eps());
}

Tensor DeepSeek::Head(const StepArrays& step, const Tensor& row_token) {
  const Activations a = View(step, row_token.dim(0));
  ops_.GatherRows(a.head_in, a.normed, row_token);      // [L,D]
  ops_.Linear(a.logits, a.head_in, *weights_.lm_head);  // [L,W]
  return a.logits;
}

// a.h + delta -> a.h, and a.delta for the next norm to add.
void DeepSeek::Layer(const Activations& a, const LayerWeights& w, const ExpertTable& experts, const Keys& keys,
                     const Tensor& delta, const StepArrays& step) {
  ops_.AddRmsNorm(a.h, a.x, Tensor(), delta, *w.input_layernorm, eps());
  Attention(a, w, keys, step);
  if (w.gate != nullptr) {
    ops_.AddRmsNorm(a.h, a.x, a.plain, a.delta, *w.post_attention_layernorm, eps());
    Moe(a, w, experts, step);
  } else {
    ops_.AddRmsNorm(a.h, a.x, Tensor(), a.delta, *w.post_attention_layernorm, eps());
    Mlp(a.delta, a, w);
  }
}

// a.x -> a.delta. Multi-head latent attention (report 2.1.1): latents are cached, heads are never.
void DeepSeek::Attention(const Activations& a, const LayerWeights& w, const Keys& keys, const StepArrays& step) {
  ops_.Linear(a.q_kv_a, a.x, *w.q_kv_a_proj);  // [T,Q+C+R]
  const int64_t kv_width = config_.kv_lora_rank + config_.qk_rope_head_dim;
  const int64_t q_width = a.q_kv_a.dim(1) - kv_width;
  const Tensor q_a = a.q_kv_a.Columns(0, q_width), kv = a.q_kv_a.Columns(q_width, kv_width);
  Tensor q = q_a;  // [T,H*(N+R)] without q_lora_rank
  if (w.q_b_proj == nullptr) {
    ops_.LatentNormRopeWrite(keys.cache, step.state, Activation(), Tensor(), kv, nullptr, *w.kv_a_layernorm, step.rows,
                             keys.rope, kLatentNormEps);
  } else {
    ops_.LatentNormRopeWrite(keys.cache, step.state, a.q_latent, q_a, kv, w.q_a_layernorm.get(), *w.kv_a_layernorm,
                             step.rows, keys.rope, kLatentNormEps);
    ops_.Linear(a.q, a.q_latent, *w.q_b_proj);
    q = a.q;
  }
  ops_.MlaAttention(a.attention, q, *w.kv_b_proj, keys.cache, step.state, step.input, step.rows, keys.rope,
                    config_.softmax_scale(), keys.first);  // [T,H*V]
  ops_.Linear(a.delta, a.attention, *w.o_proj);
}

// a.x -> out. down(silu(gate(x)) * up(x)): the dense layers, and the shared experts.
void DeepSeek::Mlp(const Tensor& out, const Activations& a, const LayerWeights& w) {
  const int64_t F = w.down_proj->cols();
  const Tensor gate_up(a.gate_up.data, a.gate_up.dtype, {a.gate_up.dim(0), 2 * F});
  Activation intermediate = a.intermediate;
  intermediate.values = Tensor(intermediate.values.data, intermediate.values.dtype, {gate_up.dim(0), F});
  if (!intermediate.scales.empty()) {
    intermediate.scales =
        Tensor(intermediate.scales.data, DType::kF32, {gate_up.dim(0), (F + kQuantGroup - 1) / kQuantGroup});
  }
  ops_.Linear(gate_up, a.x, *w.gate_up_proj);
  ops_.SiluMul(intermediate, gate_up);
  ops_.Linear(out, intermediate, *w.down_proj);
}

// a.x, a.plain -> a.delta. Routed experts wherever they live, plus the shared ones, unweighted (report eq. 12).
void DeepSeek::Moe(const Activations& a, const LayerWeights& w, const ExpertTable& experts, const StepArrays& step) {
  const bool has_shared = w.gate_up_proj != nullptr;
  ops_.Router(a.topk_slots, a.topk_weights, a.plain.empty() ? a.x.values : a.plain, *w.gate,
              w.e_score_correction_bias.get(), experts, step.rows, config_.router_options());
  // NOTE: its weights would fill the memory's queues before the router's few are through.
  if (has_shared) ops_.Beside([&] { Mlp(a.shared, a, w); });
  communicator_.Dispatch(a.expert_rows, a.x, a.topk_slots, a.topk_weights);
  ops_.GroupedLinear(a.expert_gate_up, a.expert_rows.x, *w.experts_gate_up_proj, a.expert_rows.offsets);
  ops_.GroupedSiluMul(a.expert_intermediate, a.expert_gate_up, a.expert_rows.offsets);
  ops_.GroupedLinear(a.expert_out, a.expert_intermediate, *w.experts_down_proj, a.expert_rows.offsets);
  if (has_shared) ops_.JoinBeside();
  communicator_.Combine(a.delta, a.expert_out, has_shared ? a.shared : Tensor());
}

Activations DeepSeek::View(const StepArrays& step, int64_t num_logits) const {
  return buffers_->View(static_cast<int>(step.rows.tokens.dim(0)), static_cast<int>(num_logits));
}

ExpertTable DeepSeek::Experts(int layer) const {
  if (expert_slots_.empty()) return {};
  return {expert_slots_.Rows(layer, 1).Reshape({expert_slots_.dim(1), expert_slots_.dim(2)}), Tensor()};
}

int64_t DeepSeek::ExpertTableBytes(const RankExperts& experts) {
  return static_cast<int64_t>(experts.slots.size() * sizeof(int32_t));
}

absl::Status DeepSeek::MakeExpertTables(const RankExperts& experts, Device& device) {
  const int64_t bytes = ExpertTableBytes(experts);
  auto table = device.Allocate(bytes, Device::Memory::kDevice);
  auto staging = device.Allocate(bytes, Device::Memory::kPinnedHost);
  if (!table.ok()) return table.status();
  if (!staging.ok()) return staging.status();
  expert_slots_buffer_ = *std::move(table);
  expert_slots_ = Tensor(expert_slots_buffer_.data(), DType::kI32,
                         {config_.num_hidden_layers + 1, config_.n_routed_experts, 1 + experts.num_copies});
  CHECK(expert_slots_.num_bytes() == bytes, "{} bytes of slots", bytes);
  std::copy(experts.slots.begin(), experts.slots.end(), static_cast<int32_t*>(staging->data()));
  device.Upload(expert_slots_, staging->data());
  return device.Wait(device.Record(), absl::Minutes(1));
}

absl::StatusOr<std::unique_ptr<DeepSeek>> DeepSeek::Create(const ModelConfig& config, ModelWeights weights,
                                                           const KvStore& cache, RopeTable rope, Backend& backend,
                                                           const OpLimits& limits, ActivationFormat format,
                                                           const RankExperts& experts) {
  std::unique_ptr<DeepSeek> model(new DeepSeek(config, std::move(weights), cache, rope, backend));
  auto buffers = ActivationBuffers::Create(model->config_, backend, limits, format);
  if (!buffers.ok()) return buffers.status();
  model->buffers_ = *std::move(buffers);
  if (config.n_routed_experts == 0) return model;
  const absl::Status status = model->MakeExpertTables(experts, backend.device());
  if (!status.ok()) return status;
  return model;
}

}  // namespace cachalot
