// Attention in any dimensions: a block a (token, head), its threads columns of the result. Right, not fast.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/exponential.h"

namespace cachalot {
namespace {

constexpr int kPlainThreads = 128;

// Column `col` of a cache entry, as bf16 has it.
template <bool kFp8>
__device__ float EntryValue(const AttentionArguments& a, const uint8_t* entry, int col) {
  if constexpr (!kFp8) return __bfloat162float(reinterpret_cast<const bf16*>(entry)[col]);
  const int groups = (a.latent_dim + kScaleGroup - 1) / kScaleGroup;
  const auto* scales = reinterpret_cast<const float*>(entry + a.latent_dim);
  if (col >= a.latent_dim) return __bfloat162float(reinterpret_cast<const bf16*>(scales + groups)[col - a.latent_dim]);
  const float value = LoadNumber(entry, col, NumberType::kE4M3) * scales[col / kScaleGroup];
  return __bfloat162float(__float2bfloat16(value));
}

template <bool kFp8>
__global__ void __launch_bounds__(kPlainThreads) PlainAttention(const AttentionArguments a) {
  __shared__ float q[kMaxLatentDim + kMaxRopeDim], scores[kPageTokens];
  const int64_t row = blockIdx.x, t = row / a.num_heads;
  const int32_t slot = a.slots[t], kv_len = a.positions[t] + 1;
  if (slot < 0) return;
  const int entry_dim = a.latent_dim + a.rope_dim, lane = threadIdx.x % kWarpSize;
  const bf16* query = static_cast<const bf16*>(a.q) + row * entry_dim;
  for (int i = threadIdx.x; i < entry_dim; i += kPlainThreads) q[i] = __bfloat162float(query[i]);
  float max = -INFINITY, sum = 0, o[kMaxLatentDim / kPlainThreads] = {};
  for (int32_t first = 0; first < kv_len; first += kPageTokens) {
    const int num_keys = min(kPageTokens, kv_len - first);
    const uint8_t* page =
        a.cache + a.block_table[slot * a.table_stride + first / kPageTokens] * a.token_bytes * kPageTokens;
    __syncthreads();
    const int first_there = first < a.first_key ? a.first_key - first : 0;
    for (int key = first_there + threadIdx.x / kWarpSize; key < num_keys; key += kPlainThreads / kWarpSize) {
      float score = 0;
      for (int i = lane; i < entry_dim; i += kWarpSize) {
        score = fmaf(q[i], EntryValue<kFp8>(a, page + key * a.token_bytes, i), score);
      }
      score = WarpSum(score);
      if (lane == 0) scores[key] = score * a.softmax_scale * kLog2E;
    }
    __syncthreads();
    float new_max = max;
    for (int key = first_there; key < num_keys; ++key) new_max = fmaxf(new_max, scores[key]);
    const float shrink = Exp2(max - new_max);
    max = new_max;
    sum *= shrink;
#pragma unroll
    for (float& value : o) value *= shrink;
    for (int key = first_there; key < num_keys; ++key) {
      const float p = Exp2(scores[key] - max), rounded = __bfloat162float(__float2bfloat16(p));
      sum += p;
#pragma unroll
      for (int i = 0; i < kMaxLatentDim / kPlainThreads; ++i) {
        const int col = i * kPlainThreads + threadIdx.x;
        if (col < a.latent_dim) o[i] = fmaf(rounded, EntryValue<kFp8>(a, page + key * a.token_bytes, col), o[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxLatentDim / kPlainThreads; ++i) {
    const int col = i * kPlainThreads + threadIdx.x;
    if (col < a.latent_dim) static_cast<bf16*>(a.out)[row * a.latent_dim + col] = __float2bfloat16(o[i] / sum);
  }
}

}  // namespace

void LaunchPlainAttention(cudaStream_t stream, const AttentionArguments& a) {
  const auto blocks = static_cast<unsigned>(a.num_tokens * a.num_heads);
  if (a.is_fp8) {
    PlainAttention<true><<<blocks, kPlainThreads, 0, stream>>>(a);
  } else {
    PlainAttention<false><<<blocks, kPlainThreads, 0, stream>>>(a);
  }
}

}  // namespace cachalot
