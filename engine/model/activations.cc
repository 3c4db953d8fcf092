// Activations: allocation at the maxima, views per step.
#include "engine/model/activations.h"

#include <algorithm>

namespace cachalot {
namespace {

// NOTE: what other ranks send has nothing to do with this one's tokens: a rank without any computes for the others.
int64_t NumExpertRows(const OpLimits& limits, int64_t num_tokens) {
  if (limits.max_expert_rows > 0) return limits.max_expert_rows;
  if (limits.num_ranks == 1) return num_tokens * limits.num_experts_per_tok;
  return limits.num_ranks * num_tokens * std::min(limits.num_experts_per_tok, limits.num_local_experts);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ActivationBuffers>> ActivationBuffers::Create(const ModelConfig& config,
                                                                             Backend& backend, const OpLimits& limits,
                                                                             ActivationFormat format) {
  std::unique_ptr<ActivationBuffers> buffers(new ActivationBuffers(&backend.device(), limits));
  buffers->MakeAll(config, backend.value_dtype(), format);
  if (!buffers->status_.ok()) return buffers->status_;
  return buffers;
}

int64_t ActivationBuffers::Bytes(const ModelConfig& config, DType value_dtype, const OpLimits& limits,
                                 ActivationFormat format) {
  ActivationBuffers buffers(nullptr, limits);
  buffers.MakeAll(config, value_dtype, format);
  return buffers.bytes_;
}

void ActivationBuffers::MakeAll(const ModelConfig& config, DType value, ActivationFormat format) {
  const OpLimits& limits = limits_;
  Activations& a = full_;
  const ActivationFormat plain = value == DType::kF32 ? ActivationFormat::kF32 : ActivationFormat::kBF16;
  const int64_t T = limits.max_tokens, L = limits.max_rows, D = limits.hidden_size, M = NumExpertRows(limits, T);
  const int64_t q_width = static_cast<int64_t>(limits.num_heads) * (limits.qk_nope_head_dim + limits.qk_rope_head_dim);
  const int64_t q_a_width = limits.q_lora_rank > 0 ? limits.q_lora_rank : q_width;

  a.h = NewTensor(value, T, D);
  a.x = NewActivation(format, T, D);
  if (format == ActivationFormat::kFP8) a.plain = NewTensor(value, T, D);
  a.q_kv_a = NewTensor(value, T, q_a_width + limits.kv_lora_rank + limits.qk_rope_head_dim);
  if (limits.q_lora_rank > 0) {
    a.q_latent = NewActivation(format, T, limits.q_lora_rank);
    a.q = NewTensor(value, T, q_width);
  }
  a.attention = NewActivation(format, T, static_cast<int64_t>(limits.num_heads) * limits.v_head_dim);
  a.delta = NewTensor(value, T, D);
  a.gate_up = NewTensor(value, T, 2 * limits.max_ffn_width);
  a.intermediate = NewActivation(format, T, limits.max_ffn_width);
  if (M > 0) {
    const int64_t F = config.moe_intermediate_size;
    a.shared = NewTensor(value, T, D);
    a.topk_slots = NewTensor(DType::kI32, T, limits.num_experts_per_tok);
    a.topk_weights = NewTensor(DType::kF32, T, limits.num_experts_per_tok);
    a.expert_rows = {NewActivation(format, M, D), NewTensor(DType::kI32, 1, limits.num_local_experts + 1)};
    a.expert_gate_up = NewTensor(value, M, 2 * F);
    a.expert_intermediate = NewActivation(format, M, F);
    a.expert_out = NewTensor(value, M, D);
  }
  a.normed = NewActivation(plain, T, D);
  a.head_in = NewActivation(plain, L, D);
  a.logits = NewTensor(DType::kF32, L, limits.vocab_size);
  if (limits.max_drafts == 0) return;
  a.previous = NewTensor(value, T, D);
  a.eh = NewActivation(plain, T, 2 * D);
}

Tensor ActivationBuffers::NewTensor(DType dtype, int64_t rows, int64_t cols) {
  const int64_t bytes = rows * cols * DTypeBytes(dtype);
  bytes_ += bytes;
  if (device_ == nullptr) return Tensor(nullptr, dtype, {rows, cols});
  auto buffer = device_->Allocate(bytes, Device::Memory::kDevice);
  if (!buffer.ok()) {
    status_.Update(buffer.status());
    return Tensor();
  }
  buffers_.push_back(*std::move(buffer));
  return Tensor(buffers_.back().data(), dtype, {rows, cols});
}

Activation ActivationBuffers::NewActivation(ActivationFormat format, int64_t rows, int64_t cols) {
  switch (format) {
    case ActivationFormat::kF32: return {NewTensor(DType::kF32, rows, cols), Tensor()};
    case ActivationFormat::kBF16: return {NewTensor(DType::kBF16, rows, cols), Tensor()};
    case ActivationFormat::kFP8: break;
  }
  return {NewTensor(DType::kF8E4M3, rows, cols), NewTensor(DType::kF32, rows, (cols + kQuantGroup - 1) / kQuantGroup)};
}

Activations ActivationBuffers::View(int num_tokens, int num_rows) const {
  const auto head = [](const Tensor& t, int64_t rows) { return t.empty() ? t : t.Rows(0, rows); };
  const auto head_of = [](const Activation& a, int64_t rows) { return a.values.empty() ? a : a.Rows(0, rows); };
  const int64_t T = num_tokens, M = NumExpertRows(limits_, T);
  Activations a = full_;
  for (Tensor* t : {&a.h, &a.plain, &a.q_kv_a, &a.q, &a.delta, &a.gate_up, &a.shared, &a.topk_slots, &a.topk_weights,
                    &a.previous}) {
    *t = head(*t, T);
  }
  for (Activation* t : {&a.x, &a.q_latent, &a.attention, &a.intermediate, &a.normed, &a.eh}) *t = head_of(*t, T);
  for (Tensor* t : {&a.expert_gate_up, &a.expert_out}) *t = head(*t, M);
  for (Activation* t : {&a.expert_rows.x, &a.expert_intermediate}) *t = head_of(*t, M);
  if (M > 0) a.expert_rows.offsets = a.expert_rows.offsets.Reshape({limits_.num_local_experts + 1});
  a.head_in = a.head_in.Rows(0, num_rows);
  a.logits = a.logits.Rows(0, num_rows);
  return a;
}

}  // namespace cachalot
