// Launch of the router's selection.
#ifndef CACHALOT_KERNELS_CUDA_ROUTER_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_ROUTER_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cachalot {

inline constexpr int kMaxRouterExperts = 1024;

struct SelectArgs {
  int32_t* topk_slots;  // [T, top_k]
  int64_t topk_slots_stride;
  float* topk_weights;  // [T, top_k]
  int64_t topk_weights_stride;
  const float* logits;          // [T, num_experts], contiguous
  const float* bias;            // [num_experts], or null
  const int32_t* expert_slots;  // [num_experts, 1 + copies]: ExpertTable
  int32_t expert_slots_stride;
  int64_t* expert_counts;  // [num_experts], or null
  const int32_t* slots;    // [T]
  int64_t num_rows;
  int32_t num_experts, top_k, n_group, topk_group;
  bool is_softmax, is_top2_sum, normalises;
  float factor;
};
void LaunchSelectExperts(cudaStream_t stream, const SelectArgs& args);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_ROUTER_KERNELS_H_
