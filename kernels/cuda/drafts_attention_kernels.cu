// Attention that leaves out the first keys, in any dimensions: a block a (token, head), its warps share the keys out.
// For the few rows that drafts are made of; right, not fast.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/drafts_kernels.h"
#include "kernels/cuda/rows.cuh"
#include "kernels/exponential.h"

namespace cachalot {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kEntryLanes = (kMaxLatentDim + kMaxRopeDim) / kWarpSize, kLatentLanes = kMaxLatentDim / kWarpSize;

// Column `col` of a cache entry, as bf16 has it.
template <bool kFp8>
__device__ float EntryAt(const AttentionArguments& a, const uint8_t* entry, int col) {
  if constexpr (!kFp8) return __bfloat162float(reinterpret_cast<const bf16*>(entry)[col]);
  const int groups = (a.latent_dim + kScaleGroup - 1) / kScaleGroup;
  const auto* scales = reinterpret_cast<const float*>(entry + a.latent_dim);
  if (col >= a.latent_dim) return __bfloat162float(reinterpret_cast<const bf16*>(scales + groups)[col - a.latent_dim]);
  return __bfloat162float(__float2bfloat16(LoadNumber(entry, col, NumberType::kE4M3) * scales[col / kScaleGroup]));
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads) AttentionFrom(const AttentionArguments a, int first_key) {
  __shared__ float query[kMaxLatentDim + kMaxRopeDim], maxima[kWarps], sums[kWarps], means[kWarps][kMaxLatentDim];
  const int64_t row = blockIdx.x, t = row / a.num_heads;
  const int32_t slot = a.slots[t], num_keys = a.positions[t] + 1;
  if (slot < 0) return;
  const int entry_dim = a.latent_dim + a.rope_dim, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bf16* q = static_cast<const bf16*>(a.q) + row * entry_dim;
  for (int i = threadIdx.x; i < entry_dim; i += kThreads) query[i] = __bfloat162float(q[i]);
  __syncthreads();

  // Every warp over its keys.
  float max = -INFINITY, sum = 0, mean[kLatentLanes] = {}, entry[kEntryLanes];
  for (int32_t key = first_key + warp; key < num_keys; key += kWarps) {
    const int64_t block = a.block_table[slot * a.table_stride + key / kPageTokens];
    const uint8_t* bytes = a.cache + (block * kPageTokens + key % kPageTokens) * a.token_bytes;
    float score = 0;
#pragma unroll
    for (int i = 0; i < kEntryLanes; ++i) {
      const int col = i * kWarpSize + lane;
      entry[i] = col < entry_dim ? EntryAt<kFp8>(a, bytes, col) : 0.0f;
      if (col < entry_dim) score = fmaf(query[col], entry[i], score);
    }
    score = WarpSum(score) * a.softmax_scale * kLog2E;
    const float new_max = fmaxf(max, score), shrink = Exp2(max - new_max), p = Exp2(score - new_max);
    max = new_max;
    sum = fmaf(sum, shrink, p);
#pragma unroll
    for (int i = 0; i < kLatentLanes; ++i) mean[i] = fmaf(p, entry[i], mean[i] * shrink);
  }
  if (lane == 0) maxima[warp] = max, sums[warp] = sum;
#pragma unroll
  for (int i = 0; i < kLatentLanes; ++i) means[warp][i * kWarpSize + lane] = mean[i];
  __syncthreads();

  // All together; a warp that saw no key has the weight 0.
  float all_max = maxima[0], weights[kWarps], total = 0;
  for (int w = 1; w < kWarps; ++w) all_max = fmaxf(all_max, maxima[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weights[w] = maxima[w] == -INFINITY ? 0.0f : Exp2(maxima[w] - all_max);
    total = fmaf(sums[w], weights[w], total);
  }
  for (int col = threadIdx.x; col < a.latent_dim; col += kThreads) {
    float value = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value = fmaf(means[w][col], weights[w], value);
    static_cast<bf16*>(a.out)[row * a.latent_dim + col] = __float2bfloat16(value / total);
  }
}

}  // namespace

void LaunchAttentionFrom(cudaStream_t stream, const AttentionArguments& a, int first_key) {
  const auto blocks = static_cast<unsigned>(a.num_tokens * a.num_heads);
  if (a.is_fp8) {
    AttentionFrom<true><<<blocks, kThreads, 0, stream>>>(a, first_key);
  } else {
    AttentionFrom<false><<<blocks, kThreads, 0, stream>>>(a, first_key);
  }
}

}  // namespace cachalot
