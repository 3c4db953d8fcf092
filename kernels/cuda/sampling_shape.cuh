// What shapes the logits that a row draws from: penalties, a mask, bans and biases. Most tokens are alike; those that
// are not (masked, banned, biased, drafted later) are dead to a pass over the row, and extras bring back what they
// count.
#ifndef CACHALOT_KERNELS_CUDA_SAMPLING_SHAPE_CUH_
#define CACHALOT_KERNELS_CUDA_SAMPLING_SHAPE_CUH_

#include "kernels/cuda/sampling_rank.cuh"

namespace cachalot {
namespace {

constexpr uint32_t kGeneratedMask = 0x7fff;  // of a count; the bit above is the prompt's

__device__ Shape MakeShape(const SampleArgs& args, int l, int slot, const DrawParams& p, uint32_t position) {
  Shape shape = {};
  shape.raw = args.logits + l * args.logits_stride;
  const bool has_penalties = p.presence_penalty != 0 || p.frequency_penalty != 0 || p.repetition_penalty != 1;
  if (has_penalties && args.counts != nullptr) shape.counts = args.counts + slot * args.counts_stride;
  if (args.mask != nullptr) shape.mask = args.mask + l * args.mask_stride;
  if (args.token_biases != nullptr) {
    shape.banned = reinterpret_cast<const BiasEntry*>(args.token_biases + slot * args.token_biases_stride);
    shape.num_banned = p.num_banned;
    shape.biased = shape.banned + p.num_banned;
    shape.num_biased = p.num_biased;
  }
  shape.first_later = args.row_token[l] + 1;
  shape.last_later = args.query_start[args.row_seq[l] + 1];
  shape.row_tokens = args.tokens;
  shape.num_valid = args.num_valid_tokens;
  shape.is_banning = shape.num_banned > 0 && static_cast<int32_t>(position) - p.prompt_tokens < p.min_tokens;
  return shape;
}

__device__ __forceinline__ float Penalized(float logit, uint32_t count, const DrawParams& p) {
  if (count == 0) return logit;
  const int generated = static_cast<int>(count & kGeneratedMask);
  logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
  logit -= p.frequency_penalty * static_cast<float>(generated);
  return generated > 0 ? logit - p.presence_penalty : logit;
}

// Whether the token was alive; now it is dead.
__device__ __forceinline__ bool Kill(Shared& sh, int token) {
  const uint32_t bit = 1u << (token % 32);
  return (atomicOr(&sh.dead[token / 32], bit) & bit) == 0;
}

__device__ __forceinline__ void AddExtra(Shared& sh, int token, float logit) {
  sh.extras[atomicAdd(&sh.num_extras, 1)] = {token, logit};
}

// How often a token occurs before this row. NOTE: BeginStep counted every row of the sequence; what follows this row
// (drafts) is not in its past.
__device__ uint32_t CountBefore(const Shape& shape, int token) {
  uint32_t count = shape.counts[token];
  for (int row = shape.first_later; row < shape.last_later; ++row) {
    if (shape.row_tokens[row] == token && (count & kGeneratedMask) != 0) --count;
  }
  return count;
}

__device__ float BiasedLogit(const Shape& shape, int token) {
  for (int i = 0; i < shape.num_biased; ++i) {
    if (shape.biased[i].token == token) return shape.raw[token] + shape.biased[i].bias;
  }
  return shape.raw[token];
}

// Finds the dead, and what comes back of them: a token once, a ban before all. Every extra is of another token.
__device__ __noinline__ void MakeExtras(Shared& sh) {
  const Shape shape = sh.shape;
  const DrawParams& p = sh.params;
  __syncthreads();
  if (threadIdx.x == 0) sh.num_extras = 0;
  for (int i = threadIdx.x; i < (shape.num_valid + 31) / 32; i += kThreads) {
    sh.dead[i] = shape.mask != nullptr ? ~__ldg(shape.mask + i) : 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; shape.is_banning && i < shape.num_banned; i += kThreads) {
    const int token = shape.banned[i].token;
    if (token >= 0 && token < shape.num_valid) Kill(sh, token);
  }
  __syncthreads();
  const int last = min(shape.last_later, shape.first_later + kMaxLater);
  for (int row = shape.first_later + threadIdx.x; shape.counts != nullptr && row < last; row += kThreads) {
    const int token = shape.row_tokens[row];
    if (token < 0 || token >= shape.num_valid || !Kill(sh, token)) continue;
    AddExtra(sh, token, Penalized(BiasedLogit(shape, token), CountBefore(shape, token), p));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < shape.num_biased; i += kThreads) {
    const auto [token, bias] = shape.biased[i];
    if (token < 0 || token >= shape.num_valid || !Kill(sh, token)) continue;
    AddExtra(sh, token, Penalized(shape.raw[token] + bias, shape.counts != nullptr ? shape.counts[token] : 0, p));
  }
  __syncthreads();
}

// Logits of ids 4 * group .. + 3.
__device__ __forceinline__ float4 LoadRaw(const Shape& shape, int group) {
  float4 x;
  asm("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(reinterpret_cast<const float4*>(shape.raw) + group));
  return x;
}

// Their counts, packed; zeros where nothing is penalised.
__device__ __forceinline__ uint2 LoadCounts(const Shape& shape, int group) {
  if (shape.counts == nullptr) return make_uint2(0, 0);
  return __ldg(reinterpret_cast<const uint2*>(shape.counts) + group);
}

// Before temperature; the dead at -inf.
__device__ __forceinline__ float4 Shaped(const Shared& sh, int group, float4 x, const uint2& counts) {
  const DrawParams& p = sh.params;
  if ((counts.x | counts.y) != 0) {
    x.x = Penalized(x.x, counts.x & 0xffffu, p);
    x.y = Penalized(x.y, counts.x >> 16, p);
    x.z = Penalized(x.z, counts.y & 0xffffu, p);
    x.w = Penalized(x.w, counts.y >> 16, p);
  }
  const uint32_t dead = sh.dead[group / 8] >> (4 * (group % 8)) & 0xfu;
  if (dead != 0) {
    if ((dead & 1) != 0) x.x = -INFINITY;
    if ((dead & 2) != 0) x.y = -INFINITY;
    if ((dead & 4) != 0) x.z = -INFINITY;
    if ((dead & 8) != 0) x.w = -INFINITY;
  }
  return x;
}
__device__ __forceinline__ float ShapedToken(const Shared& sh, const Shape& shape, int id, float x) {
  if (!shape.IsShaped()) return x;
  if ((sh.dead[id / 32] >> (id % 32) & 1) != 0) return -INFINITY;
  return shape.counts != nullptr ? Penalized(x, shape.counts[id], sh.params) : x;
}

}  // namespace
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_SAMPLING_SHAPE_CUH_
