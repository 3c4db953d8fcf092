// The router: fp32 scores, groups, top-k.
#include <algorithm>
#include <atomic>
#include <limits>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/router_kernels.h"

namespace cachalot {
namespace {

// The index of the largest value that is not taken, the lowest among equals.
int LargestFree(const float* values, const uint8_t* taken, int n) {
  int best = -1;
  for (int i = 0; i < n; ++i) {
    if (taken[i] == 0 && (best < 0 || values[i] > values[best])) best = i;
  }
  return best;
}

// How good a group is: its best expert, or its two best together.
float GroupScore(const float* biased, int size, RouterOptions::GroupScore rule) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (int i = 0; i < size; ++i) {
    if (biased[i] > first) {
      second = first;
      first = biased[i];
    } else if (biased[i] > second) {
      second = biased[i];
    }
  }
  return rule == RouterOptions::GroupScore::kMax || size == 1 ? first : first + second;
}

// Experts outside of the best groups are masked with -inf.
void MaskGroups(float* biased, int num_experts, const RouterOptions& options, float* group_scores, uint8_t* taken) {
  const int size = num_experts / options.n_group;
  for (int g = 0; g < options.n_group; ++g) {
    group_scores[g] = GroupScore(biased + g * size, size, options.group_score);
    taken[g] = 0;
  }
  for (int i = 0; i < options.topk_group; ++i) taken[LargestFree(group_scores, taken, options.n_group)] = 1;
  for (int g = 0; g < options.n_group; ++g) {
    if (taken[g] == 0) std::fill_n(biased + g * size, size, -std::numeric_limits<float>::infinity());
  }
}

}  // namespace

void CpuOps::Router(const Tensor& topk_slots, const Tensor& topk_weights, const Tensor& x, const Weight& gate,
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
  const float* bias = nullptr;
  if (correction_bias != nullptr) {
    const auto* vector = dynamic_cast<const CpuVector*>(correction_bias);
    CHECK(vector != nullptr && vector->cols() == num_experts, "the bias has {} values", correction_bias->cols());
    bias = vector->values();
  }

  const Tensor logits(SharedArena().Take<float>(num_rows * num_experts), DType::kF32, {num_rows, num_experts});
  Linear(logits, Activation{x, Tensor()}, gate);

  int64_t* counts = experts.counts.empty() ? nullptr : experts.counts.as<int64_t>();
  const int n = static_cast<int>(num_experts);
  const auto route = [&](int64_t t, Arena arena) {
    int32_t* chosen = topk_slots.row<int32_t>(t);
    float* weights = topk_weights.row<float>(t);
    if (rows.slots.as<int32_t>()[t] < 0) {
      std::fill_n(chosen, top_k, -1);
      std::fill_n(weights, top_k, 0.0f);
      return;
    }
    float* scores = logits.row<float>(t);
    float* biased = arena.Take<float>(num_experts);
    float* group_scores = arena.Take<float>(options.n_group);
    uint8_t* taken = arena.Take<uint8_t>(std::max<int64_t>(num_experts, options.n_group));
    RouterScores(options.scoring, scores, num_experts);
    for (int e = 0; e < n; ++e) biased[e] = bias != nullptr ? scores[e] + bias[e] : scores[e];
    if (options.n_group > 1) MaskGroups(biased, n, options, group_scores, taken);

    // Chosen by biased score, weighted by the unbiased one.
    std::fill_n(taken, num_experts, 0);
    float sum = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int e = LargestFree(biased, taken, n);
      taken[e] = 1;
      const int32_t* copies = experts.slots.row<int32_t>(e);
      chosen[k] = copies[1 + t % copies[0]];
      if (counts != nullptr) std::atomic_ref(counts[e]).fetch_add(1, std::memory_order_relaxed);
      weights[k] = scores[e];
      sum += scores[e];
    }
    for (int64_t k = 0; k < top_k; ++k) {
      if (options.norm_topk_prob) weights[k] /= sum + 1e-20f;
      weights[k] *= options.routed_scaling_factor;
    }
  };
  ForRows(num_rows, 4 * num_experts * top_k, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t t = begin; t < end; ++t) route(t, WorkerArena(worker));
  });
}

}  // namespace cachalot
