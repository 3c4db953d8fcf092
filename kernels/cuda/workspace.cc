// The verbs' workspace: one list of sizes, for those who plan memory and for the allocation.
#include "kernels/cuda/workspace.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/prefill_attention_kernels.h"
#include "kernels/cuda/sampling_kernels.h"

namespace cachalot {
namespace {

enum Part {
  kRouterLogits,
  kAttention,
  kAttentionOut,
  kAttentionPlan,
  kAttentionPartials,
  kProcessedLogits,
  kDraftSamples,
  kNumParts
};

constexpr size_t kAlignment = 256, kBf16 = 2, kF32 = 4;

// Absorbed queries come first, what attention makes of them behind.
size_t LatentOutOffset(const OpLimits& limits) {
  const size_t row = static_cast<size_t>(limits.num_heads) * (limits.kv_lora_rank + limits.qk_rope_head_dim) * kBf16;
  return (limits.max_tokens * row / kAlignment + 1) * kAlignment;
}

size_t PrefillBytes(const OpLimits& limits, int window) {
  PrefillArguments unused;
  return window == 0 ? 0
                     : PlacePrefillWorkspace(nullptr, limits.max_tokens, limits.max_sequences, limits.num_heads, window,
                                             &unused);
}

// As many tiles as fit where the absorbed form has its arrays, but not too few. 0: not this model.
int PrefillWindow(const OpLimits& limits) {
  constexpr int kMinWindow = 32;
  if (limits.kv_lora_rank != kLatentDim || limits.qk_rope_head_dim != kRopeDim ||
      limits.qk_nope_head_dim != kPrefillNopeDim || limits.v_head_dim != kPrefillValueDim) {
    return 0;
  }
  const size_t least = PrefillBytes(limits, kMinWindow);
  const size_t tile = PrefillBytes(limits, kMinWindow + 1) - least;
  const size_t absorbed =
      LatentOutOffset(limits) + static_cast<size_t>(limits.max_tokens) * limits.num_heads * limits.kv_lora_rank * kBf16;
  return kMinWindow + (absorbed > least ? static_cast<int>((absorbed - least) / tile) : 0);
}

std::array<size_t, kNumParts> PartBytes(const OpLimits& limits, int num_sms) {
  const size_t tokens = limits.max_tokens, heads = limits.num_heads;
  std::array<size_t, kNumParts> bytes = {};
  bytes[kRouterLogits] = tokens * limits.num_experts * kF32;
  bytes[kAttention] = std::max(LatentOutOffset(limits) + tokens * heads * limits.kv_lora_rank * kBf16,
                               PrefillBytes(limits, PrefillWindow(limits)));
  bytes[kAttentionOut] = tokens * heads * limits.v_head_dim * kBf16;
  bytes[kAttentionPlan] = AttentionPlanBytes(limits.max_tokens, limits.max_sequences, limits.num_heads, num_sms);
  bytes[kAttentionPartials] = AttentionPartialsBytes(num_sms);
  bytes[kProcessedLogits] = static_cast<size_t>(limits.max_rows) * SampleWorkStride(limits.vocab_size) * kF32;
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
  workspace_.attention = data[kAttention];
  workspace_.latent_out_offset = LatentOutOffset(options_.limits);
  workspace_.prefill_window = PrefillWindow(options_.limits);
  workspace_.attention_out = data[kAttentionOut];
  workspace_.attention_plan = data[kAttentionPlan];
  workspace_.attention_partials = static_cast<float*>(data[kAttentionPartials]);
  workspace_.processed_logits = static_cast<float*>(data[kProcessedLogits]);
  workspace_.draft_samples = data[kDraftSamples];
  return absl::OkStatus();
}

}  // namespace cachalot
