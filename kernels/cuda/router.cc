// The router: fp32 logits by a product, then groups and top-k.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/router_kernels.h"

namespace cachalot {
namespace {

// Shared memory of a block without an opt-in holds this many experts and groups.
constexpr int64_t kMaxSharedEntries = 1536;

}  // namespace

void CudaOps::Router(const Tensor& topk_slots, const Tensor& topk_weights, const Tensor& x, const Weight& gate,
                     const Weight* correction_bias, const ExpertTable& experts, const StepRows& rows,
                     const RouterOptions& options) {
  const int64_t num_rows = x.dim(0), num_experts = gate.rows(), top_k = topk_slots.dim(1);
  CHECK_SHAPE(topk_slots, num_rows, top_k);
  CHECK_SHAPE(topk_weights, num_rows, top_k);
  CHECK_SHAPE(x, num_rows, gate.cols());
  CHECK_SHAPE(experts.slots, num_experts, -1);
  if (!experts.counts.empty()) CHECK_SHAPE(experts.counts, num_experts);
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK(top_k <= num_experts && options.n_group >= 1 && num_experts % options.n_group == 0 &&
            options.topk_group <= options.n_group,
        "{} of {} experts in {} of {} groups", top_k, num_experts, options.topk_group, options.n_group);
  CHECK(num_experts <= kMaxRouterExperts && num_experts + options.n_group <= kMaxSharedEntries, "{} experts",
        num_experts);
  CHECK(num_rows <= options_.limits.max_tokens && num_experts <= options_.limits.num_experts,
        "the workspace has no room for logits of {} tokens and {} experts", num_rows, num_experts);
  const float* bias = correction_bias != nullptr ? VectorValues(*correction_bias, num_experts) : nullptr;
  if (num_rows == 0) return;
  const Tensor logits(workspace_.router_logits, DType::kF32, {num_rows, num_experts});
  Multiply(logits, 0, Activation{x, Tensor()}, 0, LinearRef(gate), nullptr);
  LaunchSelectExperts(stream_.get(), {.topk_slots = topk_slots.as<int32_t>(),
                                      .topk_slots_stride = topk_slots.row_stride,
                                      .topk_weights = topk_weights.as<float>(),
                                      .topk_weights_stride = topk_weights.row_stride,
                                      .logits = workspace_.router_logits,
                                      .bias = bias,
                                      .expert_slots = experts.slots.as<int32_t>(),
                                      .expert_slots_stride = static_cast<int32_t>(experts.slots.row_stride),
                                      .expert_counts = experts.counts.empty() ? nullptr : experts.counts.as<int64_t>(),
                                      .slots = rows.slots.as<int32_t>(),
                                      .num_rows = num_rows,
                                      .num_experts = static_cast<int32_t>(num_experts),
                                      .top_k = static_cast<int32_t>(top_k),
                                      .n_group = options.n_group,
                                      .topk_group = options.topk_group,
                                      .is_softmax = options.scoring == RouterOptions::Scoring::kSoftmax,
                                      .is_top2_sum = options.group_score == RouterOptions::GroupScore::kTop2Sum,
                                      .normalises = options.norm_topk_prob,
                                      .factor = options.routed_scaling_factor});
  stream_.Launched("Router");
}

}  // namespace cachalot
