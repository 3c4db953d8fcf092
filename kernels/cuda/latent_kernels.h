// Launch of the latent path: the cache's entries, and q_latent.
#ifndef CACHALOT_KERNELS_CUDA_LATENT_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_LATENT_KERNELS_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/elementwise_kernels.h"

namespace cachalot {

// The layouts of ops_types.h, KvCache.
enum class KvLayout : uint8_t { kF32, kBF16, kFP8 };

struct LatentArgs {
  uint8_t* blocks;
  int64_t block_bytes, token_bytes, num_blocks;
  KvLayout layout;
  const int32_t* block_table;  // [num_slots, table_cols]
  int64_t table_stride;
  int32_t num_slots, table_cols;
  MatrixRef kv;
  const float* kv_weight;
  int32_t kv_lora_rank, rope_dim;
  const int32_t* slots;
  const int32_t* positions;
  const float* cos_sin;
  int64_t rope_stride;
  int32_t rope_positions;
  float eps;
  RmsNormArgs q;  // its h absent: the model has no q_lora_rank
};
void LaunchLatentNormRopeWrite(cudaStream_t stream, const LatentArgs& args, int64_t num_rows);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_LATENT_KERNELS_H_
