// The verbs' workspace: one list of sizes, for those who plan memory and for the allocation.
#include "kernels/cuda/workspace.h"

#include <array>
#include <numeric>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/cuda_ops.h"

namespace cachalot {
namespace {

enum Part {
  kRouterLogits,
  kQAbsorbed,
  kLatentOut,
  kAttentionOut,
  kAttentionPlan,
  kAttentionPartials,
  kProcessedLogits,
  kDraftSamples,
  kNumParts
};

std::array<size_t, kNumParts> PartBytes(const OpLimits& limits, int num_sms) {
  constexpr size_t kAlignment = 256, kBf16 = 2, kF32 = 4;
  const size_t tokens = limits.max_tokens, heads = limits.num_heads, rank = limits.kv_lora_rank,
               rope = limits.qk_rope_head_dim;
  std::array<size_t, kNumParts> bytes = {};
  bytes[kRouterLogits] = tokens * limits.num_experts * kF32;
  bytes[kQAbsorbed] = tokens * heads * (rank + rope) * kBf16;
  bytes[kLatentOut] = tokens * heads * rank * kBf16;
  bytes[kAttentionOut] = tokens * heads * limits.v_head_dim * kBf16;
  bytes[kAttentionPlan] = AttentionPlanBytes(limits.max_tokens, limits.max_sequences, limits.num_heads, num_sms);
  bytes[kAttentionPartials] = AttentionPartialsBytes(num_sms);
  bytes[kProcessedLogits] = static_cast<size_t>(limits.max_rows) * limits.vocab_size * kF32;
  bytes[kDraftSamples] = limits.max_sequences * (2 + 2 * kMaxTopLogprobs) * kF32;
  for (size_t& part : bytes) part = (part / kAlignment + 1) * kAlignment;
  return bytes;
}

}  // namespace

size_t CudaWorkspaceBytes(const OpLimits& limits, int num_sms) {
  const auto bytes = PartBytes(limits, num_sms);
  return std::accumulate(bytes.begin(), bytes.end(), size_t{0});
}

absl::Status CudaOps::MakeWorkspace() {
  const auto bytes = PartBytes(options_.limits, num_sms_);
  std::array<void*, kNumParts> data = {};
  for (int i = 0; i < kNumParts; ++i) {
    absl::StatusOr<Buffer> buffer = device_.Allocate(bytes[i], Device::Memory::kDevice);
    if (!buffer.ok()) return buffer.status();
    data[i] = buffer->data();
    buffers_.push_back(*std::move(buffer));
  }
  workspace_.router_logits = static_cast<float*>(data[kRouterLogits]);
  workspace_.q_absorbed = data[kQAbsorbed];
  workspace_.latent_out = data[kLatentOut];
  workspace_.attention_out = data[kAttentionOut];
  workspace_.attention_plan = data[kAttentionPlan];
  workspace_.attention_partials = static_cast<float*>(data[kAttentionPartials]);
  workspace_.processed_logits = static_cast<float*>(data[kProcessedLogits]);
  workspace_.draft_samples = data[kDraftSamples];
  return absl::OkStatus();
}

}  // namespace cachalot
