// Launches of embedding, norms, silu and gathering. What they launch depends on shapes only.
#ifndef CACHALOT_KERNELS_CUDA_ELEMENTWISE_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_ELEMENTWISE_KERNELS_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/device_tensor.h"
#include "kernels/cuda/row_copy.h"

namespace cachalot {

// Rows of `table`; zeros where the slot is -1.
struct EmbedArgs {
  MatrixRef h;
  WeightRef table;
  const int32_t* tokens;
  const int32_t* slots;
};
void LaunchEmbed(cudaStream_t stream, const EmbedArgs& args, int64_t num_rows);

// x and `plain` <- the norm of h + delta as h stores it; h <- h + delta.
struct RmsNormArgs {
  MatrixRef h;
  ActivationRef x;
  MatrixRef plain;  // may be absent
  MatrixRef delta;  // likewise
  const float* weight;
  float eps;
  int32_t cols;
};
void LaunchAddRmsNorm(cudaStream_t stream, const RmsNormArgs& args, int64_t num_rows);

// `num_valid_rows`: on the device, rows from there on stay as they are; null: all of num_rows.
struct SiluMulArgs {
  ActivationRef out;
  MatrixRef gate_up;
  const int32_t* num_valid_rows;
  int64_t num_rows;
  int32_t cols;  // of out
};
void LaunchSiluMul(cudaStream_t stream, const SiluMulArgs& args);

// Row l <- row row_token[l], zeros for -1. Rows of src from `num_src_rows` on do not exist.
struct GatherRowsArgs {
  RowCopy values, scales;
  const int32_t* row_token;
  int64_t num_src_rows;
};
void LaunchGatherRows(cudaStream_t stream, const GatherRowsArgs& args, int64_t num_rows);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_ELEMENTWISE_KERNELS_H_
