// The router's selection: a warp a token, its experts in registers, or in shared memory where they fit no lanes.
#include <cmath>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/router_kernels.h"
#include "kernels/exponential.h"

namespace cachalot {
namespace {

constexpr int kWarps = 4;  // tokens of a block
constexpr int kNone = 0x7fffffff;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The warp's index of the largest value that is not taken, the lowest among equals; NaN counts as -inf. Lane l looks at
// l, l + 32, ..; bit i of its `taken` stands for l + 32 i. kNone when all are taken.
__device__ int LargestFree(const float* values, int n, uint32_t taken) {
  const int lane = threadIdx.x % kWarpSize;
  float best = -INFINITY;
  int index = kNone;
  for (int i = 0; i * kWarpSize + lane < n; ++i) {
    if (taken >> i & 1) continue;
    const float value = values[i * kWarpSize + lane];
    if (index == kNone || value > best) {
      best = isnan(value) ? -INFINITY : value;
      index = i * kWarpSize + lane;
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, offset);
    const int other_index = __shfl_xor_sync(kAllLanes, index, offset);
    if (other > best || (other == best && other_index < index)) {
      best = other;
      index = other_index;
    }
  }
  return index;
}

__device__ __forceinline__ void Take(int index, uint32_t& taken) {
  if (index % kWarpSize == static_cast<int>(threadIdx.x % kWarpSize)) taken |= 1u << (index / kWarpSize);
}

// How good a group is: its best expert, or its two best together.
__device__ float GroupScore(const float* biased, int size, bool is_top2_sum) {
  float first = -INFINITY, second = -INFINITY;
  for (int i = 0; i < size; ++i) {
    const float value = biased[i];
    if (value > first) {
      second = first;
      first = value;
    } else if (value > second) {
      second = value;
    }
  }
  return is_top2_sum && size > 1 ? first + second : first;
}

// Experts outside of the best groups are masked with -inf. `group_scores` and `is_kept`: [n_group].
__device__ void MaskGroups(const SelectArgs& a, float* biased, float* group_scores, uint8_t* is_kept) {
  const int lane = threadIdx.x % kWarpSize, size = a.num_experts / a.n_group;
  for (int g = lane; g < a.n_group; g += kWarpSize) {
    group_scores[g] = GroupScore(biased + g * size, size, a.is_top2_sum);
    is_kept[g] = 0;
  }
  __syncwarp();
  uint32_t taken = 0;
  for (int i = 0; i < a.topk_group; ++i) {
    const int g = LargestFree(group_scores, a.n_group, taken);
    if (g == kNone) break;
    Take(g, taken);
    if (lane == 0) is_kept[g] = 1;
  }
  __syncwarp();
  for (int e = lane; e < a.num_experts; e += kWarpSize) {
    if (is_kept[e / size] == 0) biased[e] = -INFINITY;
  }
  __syncwarp();
}

// `scores` <- sigmoid of each logit, or the softmax of all; `biased` <- with the correction.
__device__ void Scores(const SelectArgs& a, const float* logits, float* scores, float* biased) {
  const int lane = threadIdx.x % kWarpSize, n = a.num_experts;
  float max = -INFINITY, sum = 0.0f;
  if (a.is_softmax) {
    for (int e = lane; e < n; e += kWarpSize) max = fmaxf(max, logits[e]);
    max = WarpMax(max);
  }
  for (int e = lane; e < n; e += kWarpSize) {
    scores[e] = a.is_softmax ? Exp(logits[e] - max) : 1.0f / (1.0f + Exp(-logits[e]));
    sum += scores[e];
  }
  if (a.is_softmax) sum = WarpSum(sum);
  for (int e = lane; e < n; e += kWarpSize) {
    if (a.is_softmax) scores[e] /= sum;
    biased[e] = a.bias != nullptr ? scores[e] + a.bias[e] : scores[e];
  }
  __syncwarp();
}

// Counts row t for the expert, and finds the physical slot that it goes to.
__device__ __forceinline__ int32_t TakeCopy(const SelectArgs& a, int expert, int64_t t) {
  if (a.expert_counts != nullptr) {
    atomicAdd(reinterpret_cast<unsigned long long*>(a.expert_counts + expert), 1ull);
  }
  const int32_t* copies = a.expert_slots + static_cast<int64_t>(expert) * a.expert_slots_stride;
  return copies[1 + static_cast<uint32_t>(t) % static_cast<uint32_t>(copies[0])];
}

// Chosen by biased score, weighted by the unbiased one. Lane k % 32 writes choice k.
__device__ void Choose(const SelectArgs& a, int64_t t, const float* scores, const float* biased, int32_t* chosen,
                       float* weights) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t taken = 0;
  float sum = 0.0f;
  for (int k = 0; k < a.top_k; ++k) {
    const int e = LargestFree(biased, a.num_experts, taken);
    if (e == kNone) break;
    Take(e, taken);
    sum += scores[e];
    if (lane != k % kWarpSize) continue;
    chosen[k] = TakeCopy(a, e, t);
    weights[k] = scores[e];
  }
  for (int k = lane; k < a.top_k; k += kWarpSize) {
    if (a.normalises) weights[k] /= sum + 1e-20f;
    weights[k] *= a.factor;
  }
}

__global__ void __launch_bounds__(kWarps* kWarpSize) SelectExpertsKernel(SelectArgs a) {
  extern __shared__ float memory[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (t >= a.num_rows) return;
  int32_t* chosen = a.topk_slots + t * a.topk_slots_stride;
  float* weights = a.topk_weights + t * a.topk_weights_stride;
  if (a.slots[t] < 0) {
    for (int k = lane; k < a.top_k; k += kWarpSize) {
      chosen[k] = -1;
      weights[k] = 0.0f;
    }
    return;
  }
  const int words = 2 * a.num_experts + 2 * a.n_group;
  float* scores = memory + warp * words;
  float* biased = scores + a.num_experts;
  float* group_scores = biased + a.num_experts;
  Scores(a, a.logits + t * a.num_experts, scores, biased);
  if (a.n_group > 1) MaskGroups(a, biased, group_scores, reinterpret_cast<uint8_t*>(group_scores + a.n_group));
  Choose(a, t, scores, biased, chosen, weights);
}

// ---- In registers: lane l has experts [l * n, (l + 1) * n), a group is some whole lanes.

constexpr int kMaxPerLane = 16;
constexpr uint32_t kTaken = 0;

// Orders floats as integers, above kTaken. NaN counts as -inf, -0 as 0.
__device__ __forceinline__ uint32_t OrderKey(float x) {
  const uint32_t bits = __float_as_uint(isnan(x) ? -INFINITY : x + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

// Of the lanes' keys the largest and the lowest lane that has it.
__device__ __forceinline__ int LaneOfLargest(uint32_t key, uint32_t* largest) {
  *largest = __reduce_max_sync(kAllLanes, key);
  return __ffs(__ballot_sync(kAllLanes, key == *largest)) - 1;
}

// Whether this lane's group is among the best. `biased`: its n experts.
template <int kPerLane>
__device__ __forceinline__ bool IsInKeptGroup(const SelectArgs& a, int n, const float (&biased)[kPerLane]) {
  float first = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i >= n || !(biased[i] > second)) continue;
    second = fminf(first, biased[i]);
    first = fmaxf(first, biased[i]);
  }
  const int size = a.num_experts / a.n_group, lanes = size / n;
  for (int offset = 1; offset < lanes; offset *= 2) {
    const float other_first = __shfl_xor_sync(kAllLanes, first, offset);
    const float other_second = __shfl_xor_sync(kAllLanes, second, offset);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  uint32_t key = OrderKey(a.is_top2_sum && size > 1 ? first + second : first);
  for (int i = 0; i < a.topk_group; ++i) {
    uint32_t largest;
    const int lane = LaneOfLargest(key, &largest);
    if (lane / lanes == static_cast<int>(threadIdx.x % kWarpSize) / lanes) key = kTaken;
  }
  return key == kTaken;
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize) SelectInRegisters(SelectArgs a) {
  const int lane = threadIdx.x % kWarpSize, n = a.num_experts / kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const bool is_row = t < a.num_rows, is_there = is_row && a.slots[t] >= 0;
  const float* logits = a.logits + t * a.num_experts + lane * n;
  float scores[kPerLane], biased[kPerLane], bias[kPerLane];
  float max = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    bias[i] = i < n && a.bias != nullptr ? __ldg(a.bias + lane * n + i) : 0.0f;
  }
  WaitForKernelBefore();
  if (!is_row) return;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    scores[i] = i < n ? logits[i] : -INFINITY;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    max = fmaxf(max, scores[i]);
  }
  if (a.is_softmax) max = WarpMax(max);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i >= n) continue;
    scores[i] = a.is_softmax ? Exp(scores[i] - max) : 1.0f / (1.0f + Exp(-scores[i]));
    sum += scores[i];
  }
  if (a.is_softmax) sum = WarpSum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    biased[i] = -INFINITY;
    if (i >= n) continue;
    if (a.is_softmax) scores[i] /= sum;
    biased[i] = scores[i] + bias[i];
  }
  const bool is_kept = a.n_group == 1 || IsInKeptGroup(a, n, biased);
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = i < n ? OrderKey(is_kept ? biased[i] : -INFINITY) : kTaken;

  // Chosen by biased score, weighted by the unbiased one. Lane k has choice k.
  int32_t chosen = -1;
  float weight = 0.0f, total = 0.0f;
  for (int k = 0; k < a.top_k; ++k) {
    uint32_t best = kTaken, largest;
    int index = 0;
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (keys[i] <= best) continue;
      best = keys[i];
      index = i;
      score = scores[i];
    }
    const int winner = LaneOfLargest(best, &largest);
    const int expert = winner * n + __shfl_sync(kAllLanes, index, winner);
    score = __shfl_sync(kAllLanes, score, winner);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane == winner && i == index) keys[i] = kTaken;
    }
    total += score;
    if (lane != k) continue;
    chosen = expert;
    weight = score;
  }
  if (lane >= a.top_k) return;
  if (a.normalises) weight /= total + 1e-20f;
  a.topk_slots[t * a.topk_slots_stride + lane] = is_there ? TakeCopy(a, chosen, t) : -1;
  a.topk_weights[t * a.topk_weights_stride + lane] = is_there ? weight * a.factor : 0.0f;
}

bool FitsLanes(const SelectArgs& a) {
  const int n = a.num_experts / kWarpSize, size = a.num_experts / a.n_group;
  if (a.num_experts % kWarpSize != 0 || n > kMaxPerLane || a.top_k > kWarpSize || size % n != 0) return false;
  const int lanes = size / n;
  return (lanes & (lanes - 1)) == 0;
}

}  // namespace

void LaunchSelectExperts(cudaStream_t stream, const SelectArgs& args) {
  const unsigned blocks = static_cast<unsigned>((args.num_rows + kWarps - 1) / kWarps);
  if (FitsLanes(args)) {
    const auto kernel = args.num_experts <= 8 * kWarpSize ? SelectInRegisters<8> : SelectInRegisters<kMaxPerLane>;
    Launch(kernel, true, blocks, kWarps * kWarpSize, 0, stream, args);
    return;
  }
  const size_t shared = sizeof(float) * kWarps * (2 * args.num_experts + 2 * args.n_group);
  SelectExpertsKernel<<<blocks, kWarps * kWarpSize, shared, stream>>>(args);
}

}  // namespace cachalot
