// Launches of kernels that begin before the one before has ended.
#ifndef CACHALOT_KERNELS_CUDA_LAUNCH_CUH_
#define CACHALOT_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime_api.h>

namespace cachalot {

// Where `is_early`, blocks may begin as soon as those of the kernel before have all allowed it: every thread has to
// call WaitForKernelBefore, and before that may read only what an earlier kernel is known to have left. The caller
// looks at errors.
template <typename... Parameters>
void Launch(void (*kernel)(Parameters...), bool is_early, dim3 blocks, unsigned threads, size_t shared_bytes,
            cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_early ? 1 : 0;
  (void)cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_LAUNCH_CUH_
