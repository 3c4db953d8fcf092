// One block a row and part: the cache's entry, or the norm of q_a.
#include <algorithm>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/latent_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rms_norm.cuh"
#include "kernels/cuda/rows.cuh"

namespace cachalot {
namespace {

constexpr int kMinThreads = 128;
static_assert(kMinThreads >= kMaxRopeDim / 2);
constexpr int kHeld = kMaxLatentDim / kMinThreads;  // values of c that a thread holds

// Where row t's entry goes; null for padding, and for what the host should not have asked for.
__device__ uint8_t* EntryOf(const LatentArgs& a, int64_t t) {
  const int32_t slot = a.slots[t], position = a.positions[t], index = position / kPageTokens;
  if (slot < 0 || slot >= a.num_slots || position < 0 || position >= a.rope_positions || index >= a.table_cols) {
    return nullptr;
  }
  const int64_t block = a.block_table[slot * a.table_stride + index];
  if (block < 0 || block >= a.num_blocks) return nullptr;
  return a.blocks + block * a.block_bytes + position % kPageTokens * a.token_bytes;
}

// `row`: c, normed, then k_pe, rotated.
__device__ void WriteFp8Entry(const LatentArgs& a, const float* row, uint8_t* entry) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  const int rank = a.kv_lora_rank, num_groups = (rank + kScaleGroup - 1) / kScaleGroup;
  for (int group = warp; group < num_groups; group += num_warps) {
    const int first = group * kScaleGroup;
    float v[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int c = first + kWarpSize * i + lane;
      v[i] = c < rank ? row[c] : 0.0f;
    }
    const float scale = QuantizeGroup(v, min(kScaleGroup, rank - first), /*is_ue8m0=*/false, entry + first);
    if (lane == 0) reinterpret_cast<float*>(entry + rank)[group] = scale;
  }
  bf16* rope = reinterpret_cast<bf16*>(entry + rank + num_groups * sizeof(float));
  for (int i = threadIdx.x; i < a.rope_dim; i += blockDim.x) rope[i] = __float2bfloat16(row[rank + i]);
}

__device__ void WriteEntry(const LatentArgs& a, const float* row, uint8_t* entry) {
  if (a.layout == KvLayout::kFP8) return WriteFp8Entry(a, row, entry);
  const NumberType type = a.layout == KvLayout::kF32 ? NumberType::kF32 : NumberType::kBF16;
  for (int i = threadIdx.x; i < a.kv_lora_rank + a.rope_dim; i += blockDim.x) StoreNumber(entry, i, type, row[i]);
}

// NOTE: a load whose type is looked up is waited for before the next: so bf16, the usual, is known beforehand.
template <bool kIsBf16>
__device__ __forceinline__ float LoadKv(const LatentArgs& a, int64_t i) {
  if constexpr (kIsBf16) return __bfloat162float(static_cast<const bf16*>(a.kv.data)[i]);
  return LoadNumber(a.kv.data, i, a.kv.type);
}

// c, normed, and k_pe, rotated, into `row`. Everything is asked for before anything is waited for: a step of few rows
// is as long as its loads are one after the other.
template <bool kIsBf16>
__device__ void NormAndRope(const LatentArgs& a, int64_t t, float* row, double* shared) {
  const int rank = a.kv_lora_rank, half = a.rope_dim / 2;
  const int64_t source = t * a.kv.row_stride;
  float v[kHeld], weight[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = threadIdx.x + i * blockDim.x;
    if (c >= rank) break;
    weight[i] = __ldg(a.kv_weight + c);
  }
  const float* cos_sin = a.cos_sin + a.positions[t] * a.rope_stride;
  const bool has_angle = static_cast<int>(threadIdx.x) < half;  // blocks have more threads than kMaxRopeDim / 2
  const float cos = has_angle ? cos_sin[threadIdx.x] : 0.0f, sin = has_angle ? cos_sin[half + threadIdx.x] : 0.0f;
  WaitForKernelBefore();
  AllowNextKernel();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = threadIdx.x + i * blockDim.x;
    if (c >= rank) break;
    v[i] = LoadKv<kIsBf16>(a, source + c);
  }
  if (has_angle) {
    const int64_t pair = source + rank + 2 * static_cast<int>(threadIdx.x);
    const float even = LoadKv<kIsBf16>(a, pair), odd = LoadKv<kIsBf16>(a, pair + 1);
    row[rank + 2 * threadIdx.x] = even * cos - odd * sin;
    row[rank + 2 * threadIdx.x + 1] = even * sin + odd * cos;
  }
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (static_cast<int>(threadIdx.x + i * blockDim.x) >= rank) break;
    squares = fma(static_cast<double>(v[i]), static_cast<double>(v[i]), squares);
  }
  const float factor = NormFactor(BlockSum(squares, shared), rank, a.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = threadIdx.x + i * blockDim.x;
    if (c >= rank) break;
    row[c] = v[i] * factor * weight[i];
  }
  __syncthreads();
}

__global__ void __launch_bounds__(1024, 1) LatentKernel(LatentArgs a, bool is_vector_q) {
  extern __shared__ float row[];
  __shared__ double shared[kWarpSize];
  const int64_t t = blockIdx.x;
  if (blockIdx.y == 0) {
    if (a.slots[t] < 0 || a.positions[t] < 0 || a.positions[t] >= a.rope_positions) {
      WaitForKernelBefore();
      return;
    }
    // NOTE: where the entry goes is looked up meanwhile.
    uint8_t* const entry = EntryOf(a, t);
    if (a.kv.type == NumberType::kBF16) {
      NormAndRope<true>(a, t, row, shared);
    } else {
      NormAndRope<false>(a, t, row, shared);
    }
    if (entry != nullptr) WriteEntry(a, row, entry);
  } else if (is_vector_q) {
    NormRowVector(a.q, t, shared);
  } else {
    NormRowScalar(a.q, t, shared);
  }
}

}  // namespace

void LaunchLatentNormRopeWrite(cudaStream_t stream, const LatentArgs& args, int64_t num_rows) {
  const bool has_q = args.q.h.data != nullptr, is_vector_q = has_q && IsVectorNorm(args.q);
  const int threads = std::max(kMinThreads, has_q ? NormThreads(args.q, is_vector_q) : 0);
  const dim3 grid(static_cast<unsigned>(num_rows), has_q ? 2 : 1);
  const size_t shared = (args.kv_lora_rank + args.rope_dim) * sizeof(float);
  Launch(LatentKernel, true, grid, threads, shared, stream, args, is_vector_q);
}

}  // namespace cachalot
