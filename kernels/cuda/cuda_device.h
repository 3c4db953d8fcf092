// CudaDevice: one GPU, one stream; steps that were prepared are replayed as graphs.
#ifndef CACHALOT_KERNELS_CUDA_CUDA_DEVICE_H_
#define CACHALOT_KERNELS_CUDA_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <memory>

#include "absl/container/flat_hash_map.h"
#include "kernels/cuda/stream.h"
#include "kernels/device.h"

namespace cachalot {

// NOTE: nothing is captured or allocated after readiness: a body whose key was not prepared runs eagerly.
class CudaDevice : public Device {
 public:
  // `ordinal`: CUDA's number of the GPU. Internal with CUDA's message when it cannot be used.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Make(int ordinal);
  ~CudaDevice() override;  // waits for what is queued; buffers must not outlive the device
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  absl::StatusOr<Buffer> Allocate(size_t bytes, Memory memory) override;
  void Upload(const Tensor& dst, const void* src) override;
  void Download(void* dst, const Tensor& src) override;
  void Submit(const StepKey& key, std::function<void()> body) override;
  absl::Status Prepare(const StepKey& key, std::function<void()> body) override;
  int NumKernels(const StepKey& key) const override;
  Event Record() override;
  bool IsComplete(Event event) override;
  absl::Status Wait(Event event, absl::Duration timeout) override;
  // 1, 2, 4, then multiples of 8 up to 256 and of 64 beyond: less than 8 rows in padding where steps are small, and few
  // enough graphs.
  int Bucket(int n) const override { return BucketOf(n); }
  static int BucketOf(int n);
  size_t FreeMemory() const override;

  CudaStream* stream() { return &stream_; }
  int ordinal() const { return ordinal_; }
  const cudaDeviceProp& properties() const { return properties_; }
  int num_sms() const { return properties_.multiProcessorCount; }

 private:
  static constexpr Event kNumEvents = 64;  // far more than are waited for at once
  struct Graph {
    cudaGraphExec_t exec = nullptr;
    int num_kernels = 0;
  };

  explicit CudaDevice(int ordinal) : ordinal_(ordinal) {}
  absl::Status Start();
  bool Use() const;  // the GPU for calls of this thread
  bool Poll(Event event);
  // `shape`: the matrix on the device; host memory is packed. Rows are dst_row and src_row bytes apart.
  void Copy(void* dst, int64_t dst_row, const void* src, int64_t src_row, const Tensor& shape, cudaMemcpyKind kind);
  absl::Status Fault() const;  // ok: none so far
  absl::StatusOr<Graph> Capture(const std::function<void()>& body);

  const int ordinal_;
  cudaDeviceProp properties_ = {};
  mutable CudaStream stream_;
  cudaStream_t side_ = nullptr;  // CudaStream::Fork
  cudaEvent_t forked_ = nullptr, ended_ = nullptr;
  absl::flat_hash_map<StepKey, Graph> graphs_;
  // Event e is in element e % kNumEvents, until a later one takes its place: then it is done when that is.
  std::array<cudaEvent_t, kNumEvents> events_ = {};
  Event recorded_ = 0, completed_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_CUDA_DEVICE_H_
