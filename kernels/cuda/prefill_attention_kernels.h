// Attention of long prefill chunks, not absorbed: keys and values of every head are made from the cached latents once
// for all rows (DeepSeek-V3 report, eq. 9-11), and cost 640 operations a pair of query and key instead of 2176.
#ifndef CACHALOT_KERNELS_CUDA_PREFILL_ATTENTION_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_PREFILL_ATTENTION_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_tensor.h"
#include "kernels/long_chunks.h"
#include "kernels/splits.h"

namespace cachalot {

// The only dimensions that this is made for, with kLatentDim and kRopeDim.
inline constexpr int kPrefillNopeDim = 128, kPrefillValueDim = 128;
inline constexpr int kPrefillKeyTile = kLongChunkKeys;

// Of the step's sequences those of `long_chunks`. Their keys, all sequences' one behind the other, are made and
// attended to in passes of a window, so that memory is bounded; what rows have seen waits between passes.
struct PrefillArguments {
  MatrixRef q;        // [T,H*(N+R)] bf16, not rotated
  ActivationRef out;  // [T,H*V] bf16 | e4m3
  WeightRef w_uk;     // H groups of [C,N]
  WeightRef w_uv;     // H groups of [V,C]
  const uint8_t* cache = nullptr;
  int64_t token_bytes = 0;
  bool is_fp8 = false;                   // the cache
  const int32_t* block_table = nullptr;  // [U, table_stride]
  int64_t table_stride = 0;
  const int32_t* seq_slot = nullptr;     // [S]
  const int32_t* query_start = nullptr;  // [S+1]
  const int32_t* positions = nullptr;    // [T]
  const int32_t* slots = nullptr;        // [T]
  const float* cos_sin = nullptr;        // [positions, R]
  int num_tokens = 0, num_sequences = 0, num_heads = 0, num_sms = 0;
  LongChunks long_chunks;
  float softmax_scale = 0;

  // Workspace.
  void* plan = nullptr;      // PrefillPlanBytes
  void* q_rope = nullptr;    // [T,H,R] bf16
  int window_tiles = 0;      // key tiles of a pass: W keys
  void* latents = nullptr;   // [W,C] bf16
  void* k_rope = nullptr;    // [W,R] bf16
  void* keys = nullptr;      // [H,W,N] bf16
  void* values = nullptr;    // [H,W,V] bf16
  float* results = nullptr;  // [T,H,V] unscaled, of rows that wait for the next pass
  float* weights = nullptr;  // [T,H,2] their maxima and sums
};

// Lays the workspace out from `memory` on and says how long it is.
size_t PlacePrefillWorkspace(void* memory, int max_tokens, int max_sequences, int num_heads, int window_tiles,
                             PrefillArguments* arguments);

// Once a device, before its first launch.
cudaError_t PreparePrefillAttention();
cudaError_t PrepareExpandLatents();

// Whether the operands lie as the kernels want them.
bool CanPrefill(const PrefillArguments& arguments);

// Writes every row from the first chunk on that has no slot, zeros, or is a chunk's. False where the driver has no
// words for the operands' shapes.
bool LaunchPrefillAttention(cudaStream_t stream, const PrefillArguments& arguments);

// Its parts, in their order; the last three for every pass.
void LaunchPlanPrefill(cudaStream_t stream, const PrefillArguments& arguments);
void LaunchRopeChunks(cudaStream_t stream, const PrefillArguments& arguments);
void LaunchGatherLatents(cudaStream_t stream, const PrefillArguments& arguments, int pass);
bool LaunchExpandLatents(cudaStream_t stream, const PrefillArguments& arguments, int pass);
bool LaunchAttendChunks(cudaStream_t stream, const PrefillArguments& arguments, int pass);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PREFILL_ATTENTION_KERNELS_H_
