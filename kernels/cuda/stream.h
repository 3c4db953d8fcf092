// CudaStream: the one stream of a rank, and the first error that anything on it met.
#ifndef CACHALOT_KERNELS_CUDA_STREAM_H_
#define CACHALOT_KERNELS_CUDA_STREAM_H_

#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

namespace cachalot {

// Errors of CUDA are sticky and final: the first is kept, Device::Wait returns it, the rank is dead. Any thread.
class CudaStream {
 public:
  cudaStream_t get() const { return stream_; }
  void set(cudaStream_t stream) { stream_ = stream; }

  // Keeps `error` when it is the first; whether all is well so far. `what`: the call or the kernel, for the message.
  bool Check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) [[likely]]
      return true;
    std::lock_guard lock(mutex_);
    if (fault_.empty()) {
      fault_ = std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
    }
    return false;
  }
  // To be called after every kernel launch.
  bool Launched(const char* kernel) { return Check(cudaGetLastError(), kernel); }

  std::string fault() const {  // empty: none
    std::lock_guard lock(mutex_);
    return fault_;
  }

 private:
  cudaStream_t stream_ = nullptr;
  mutable std::mutex mutex_;
  std::string fault_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_STREAM_H_
