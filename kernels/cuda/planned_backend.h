// PlannedCudaBackend: a GPU that need not be there. Nothing runs on it; what it would hold is counted.
#ifndef CACHALOT_KERNELS_CUDA_PLANNED_BACKEND_H_
#define CACHALOT_KERNELS_CUDA_PLANNED_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace cachalot {

// Of options with planned_memory. FreeMemory, Bucket, MeasureWeights and workspace_bytes are those of a GPU; anything
// else is not to be called.
absl::StatusOr<std::unique_ptr<Backend>> MakePlannedCudaBackend(const BackendOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PLANNED_BACKEND_H_
