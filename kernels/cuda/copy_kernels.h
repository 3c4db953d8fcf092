// Small copies between device and pinned host memory by a kernel: the driver hands a copy to a copy engine, and every
// hand-over between engines costs a step several microseconds in which the GPU idles.
#ifndef CACHALOT_KERNELS_CUDA_COPY_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_COPY_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cachalot {

constexpr int64_t kMaxKernelCopy = 256 << 10;  // bytes: beyond it a copy engine is as fast

// `dst` and `src`: device or pinned memory, any alignment. At most kMaxKernelCopy bytes.
void LaunchCopy(cudaStream_t stream, void* dst, const void* src, int64_t bytes);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_COPY_KERNELS_H_
