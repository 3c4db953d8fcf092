// What the CUDA backend makes of checkpoint tensors: copies in device memory, rows aligned for 16-byte loads.
#ifndef CACHALOT_KERNELS_CUDA_CUDA_WEIGHTS_H_
#define CACHALOT_KERNELS_CUDA_CUDA_WEIGHTS_H_

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/device_tensor.h"
#include "kernels/ops_types.h"

namespace cachalot {

// Norm weights and biases, widened to f32.
class CudaVector : public Weight {
 public:
  CudaVector(int64_t size, Buffer memory) : Weight(1, size), memory_(std::move(memory)) {}
  const float* values() const { return static_cast<const float*>(memory_.data()); }

 private:
  Buffer memory_;
};

// One matrix, or the same matrix of every local expert; parts stacked by rows have one stored type.
class CudaLinear : public Weight {
 public:
  CudaLinear(const WeightRef& ref, std::vector<Buffer> memory)
      : Weight(ref.rows, ref.cols), ref_(ref), memory_(std::move(memory)) {}
  const WeightRef& ref() const { return ref_; }

 private:
  WeightRef ref_;
  std::vector<Buffer> memory_;
};

// kv_b_proj by head, dequantised to bf16. W_UK is stored transposed: both are [out, in] of the products that absorbed
// attention makes.
class CudaKvUp : public Weight {
 public:
  CudaKvUp(int64_t rows, int64_t cols, const WeightRef& w_uk, const WeightRef& w_uv, std::vector<Buffer> memory)
      : Weight(rows, cols), w_uk_(w_uk), w_uv_(w_uv), memory_(std::move(memory)) {}
  const WeightRef& w_uk() const { return w_uk_; }  // H groups of [C, N]
  const WeightRef& w_uv() const { return w_uv_; }  // H groups of [V, C]

 private:
  WeightRef w_uk_, w_uv_;
  std::vector<Buffer> memory_;
};

// What the Makes leave for FinishWeights.
struct PendingWeights {
  // A kv_b_proj as stored, and where its halves go.
  struct KvUp {
    std::unique_ptr<CudaLinear> stored;
    WeightRef w_uk, w_uv;
  };
  std::vector<KvUp> kv_ups;
  std::deque<std::vector<uint8_t>> host_memory;  // what was made here and is being copied
  uint64_t num_random = 0;                       // tensors without data: seeds
  absl::Status status;                           // the first weight that found no room
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_CUDA_WEIGHTS_H_
