// Absorbed multi-head latent attention over the paged cache (DeepSeek-V3 report, 2.1.1), on tensor cores.
#ifndef CACHALOT_KERNELS_CUDA_ATTENTION_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_ATTENTION_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_tensor.h"
#include "kernels/splits.h"

namespace cachalot {

// What the kernel without tensor cores can do: multiples of 4 and 2. Every published model has kLatentDim and kRopeDim.
inline constexpr int kMaxLatentDim = 1024;
inline constexpr int kMaxRopeDim = 128;
inline constexpr int kPageTokens = 64;  // tokens of a block of the cache

struct AttentionArguments {
  const void* q = nullptr;  // [T,H,C+R] bf16, absorbed and rotated
  void* out = nullptr;      // [T,H,C] bf16: means of latents
  const uint8_t* cache = nullptr;
  int64_t num_blocks = 0;   // of the cache
  int64_t token_bytes = 0;  // of a cache entry: bf16, or the fp8 layout of ops_types.h
  bool is_fp8 = false, is_exact = false;
  const int32_t* block_table = nullptr;  // [U, table_stride]
  int64_t table_stride = 0;
  const int32_t* seq_slot = nullptr;     // [S], -1: padding
  const int32_t* query_start = nullptr;  // [S+1]
  const int32_t* positions = nullptr;    // [T]
  const int32_t* slots = nullptr;        // [T]
  int latent_dim = 0, rope_dim = 0;      // C, R
  int num_tokens = 0, num_sequences = 0, num_heads = 0, num_sms = 0;
  int first_key = 0;         // keys before it do not exist, nor do rows; less than kPageTokens
  int max_rows = INT32_MAX;  // sequences with so many or more are left out
  float softmax_scale = 0;
  void* plan = nullptr;       // AttentionPlanBytes
  bool has_plan = false;      // made by the launch before, of the same rows and heads
  float* partials = nullptr;  // AttentionPartialsBytes
};

// Once a device, before its first launch.
cudaError_t PrepareAttention();

size_t AttentionPlanBytes(int max_tokens, int max_sequences, int num_heads, int num_sms);
size_t AttentionPartialsBytes(int num_sms);

// Cuts the step's work into items of a tile of 64 (token, head) rows of one sequence and a run of cache blocks, then
// works them off, then joins what was split. A row attends to keys at positions up to its own. False where the driver
// has no words for the cache's shape.
bool LaunchAttention(cudaStream_t stream, const AttentionArguments& arguments);

// The same in any dimensions, without a plan and without tensor cores.
void LaunchPlainAttention(cudaStream_t stream, const AttentionArguments& arguments);

// The rotated part of every absorbed query, q_absorbed[t,h,C:] = rope(q[t, h * (nope_dim + R) + nope_dim :]), and zeros
// in `out` for rows without a slot.
struct RopeQueriesArguments {
  MatrixRef q;                     // [T, H * (nope_dim + R)]
  void* q_absorbed = nullptr;      // [T,H,C+R] bf16
  void* out = nullptr;             // [T,H,C] bf16
  const float* cos_sin = nullptr;  // [positions, R]
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;  // [T]
  int num_tokens = 0, num_heads = 0, nope_dim = 0, latent_dim = 0, rope_dim = 0;
};
void LaunchRopeQueries(cudaStream_t stream, const RopeQueriesArguments& arguments);

// out = x, in fp8 groups of 128.
void LaunchQuantize(cudaStream_t stream, const ActivationRef& out, const MatrixRef& x, int64_t rows, int64_t cols);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_ATTENTION_KERNELS_H_
