// CudaStream: a rank's stream, a second one for what may run beside it, and the first error that anything on them met.
#ifndef CACHALOT_KERNELS_CUDA_STREAM_H_
#define CACHALOT_KERNELS_CUDA_STREAM_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

namespace cachalot {

// Errors of CUDA are sticky and final: the first is kept, Device::Wait returns it, the rank is dead. Any thread.
class CudaStream {
 public:
  // Where the next launch goes.
  cudaStream_t get() const { return stream_; }
  void set(cudaStream_t stream, cudaStream_t side, cudaEvent_t forked, cudaEvent_t ended) {
    stream_ = stream, side_ = side, forked_ = forked, ended_ = ended;
  }

  // What is launched between Fork and EndFork runs after what was launched before, and beside what is launched from
  // then on until Join. A capture takes it along.
  void Fork() {
    Check(cudaEventRecord(forked_, stream_), "cudaEventRecord");
    std::swap(stream_, side_);
    Check(cudaStreamWaitEvent(stream_, forked_), "cudaStreamWaitEvent");
  }
  void EndFork() {
    Check(cudaEventRecord(ended_, stream_), "cudaEventRecord");
    std::swap(stream_, side_);
  }
  void Join() { Check(cudaStreamWaitEvent(stream_, ended_), "cudaStreamWaitEvent"); }

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

  // `fault`: what kernels that wait for other ranks say, pinned; see peer_kernels.h. Null: nobody does.
  void WatchPeers(const volatile int32_t* fault) { peer_fault_ = fault; }

  std::string fault() const {  // empty: none
    std::lock_guard lock(mutex_);
    const int32_t peer = peer_fault_ == nullptr ? 0 : *peer_fault_;
    if (!fault_.empty() || peer == 0) return fault_;
    return peer < 0 ? "another rank is gone" : "rank " + std::to_string(peer - 1) + " has not answered";
  }

 private:
  cudaStream_t stream_ = nullptr, side_ = nullptr;
  cudaEvent_t forked_ = nullptr, ended_ = nullptr;
  mutable std::mutex mutex_;
  std::string fault_;
  const volatile int32_t* peer_fault_ = nullptr;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_STREAM_H_
