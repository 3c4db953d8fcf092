// WeightLoader: host memory (the mapped checkpoint) to device memory, through pinned buffers, by many threads.
#ifndef CACHALOT_KERNELS_CUDA_WEIGHT_LOADER_H_
#define CACHALOT_KERNELS_CUDA_WEIGHT_LOADER_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "kernels/cuda/stream.h"

namespace cachalot {

// Rows to copy: `rows` rows of `row_bytes`, `dst_stride` bytes apart on the device, contiguous on the host.
struct WeightCopy {
  void* dst = nullptr;
  const void* src = nullptr;  // any alignment; must live until Finish returns
  int64_t rows = 0, row_bytes = 0, dst_stride = 0;
};

class WeightLoader {
 public:
  explicit WeightLoader(CudaStream* stream);
  ~WeightLoader();

  // Queues the copy and returns. Kernels queued on the rank's stream after Finish see the bytes.
  void Copy(const WeightCopy& copy);

  // Drops what is queued and not begun.
  void Discard();

  // Waits for all that was queued, then gives back threads and pinned memory. Internal with CUDA's error.
  absl::Status Finish();

  int64_t bytes_copied() const;  // since the start; any thread

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_WEIGHT_LOADER_H_
