// How much device memory the verbs work in, for memory plans.
#ifndef CACHALOT_KERNELS_CUDA_WORKSPACE_H_
#define CACHALOT_KERNELS_CUDA_WORKSPACE_H_

#include <cstddef>

#include "kernels/ops_types.h"

namespace cachalot {

// Just what CudaOps::MakeWorkspace allocates.
size_t CudaWorkspaceBytes(const OpLimits& limits, int num_sms);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_WORKSPACE_H_
