// Kernels that make weights: random ones, and the halves of kv_b_proj.
#ifndef CACHALOT_KERNELS_CUDA_WEIGHTS_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_WEIGHTS_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/device_tensor.h"

namespace cachalot {

// Rows of a weight to fill: `rows` of `cols` values, `row_bytes` apart.
struct FillRows {
  void* data = nullptr;
  int64_t rows = 0, cols = 0, row_bytes = 0;
  NumberType type = NumberType::kBF16;
};

// Values of mean 0, the same for the same seed. f32, bf16, f16: nearly normal, of standard deviation `deviation`. e4m3:
// bytes of magnitudes 1/8 to 1.875, of standard deviation kRandomE4m3Deviation.
inline constexpr float kRandomE4m3Deviation = 0.8446f;
void LaunchFillRandom(const FillRows& fill, uint64_t seed, float deviation, cudaStream_t stream);

// f32 values `center` * (1 + u), u uniform within +-`spread`.
void LaunchFillNear(float* data, int64_t size, uint64_t seed, float center, float spread, cudaStream_t stream);

// kv_b_proj [H*(N+V), C], one group of it, to bf16: W_UK transposed, H groups of [C, N], and W_UV, H groups of [V, C].
void LaunchSplitKvUp(const WeightRef& kv_b, const WeightRef& w_uk, const WeightRef& w_uv, cudaStream_t stream);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_WEIGHTS_KERNELS_H_
